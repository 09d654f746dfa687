"""Test processes that run side by side compute on one thread each: with a team of threads on every core
they would spend their time waiting for each other. So do the processes that they start here. Tests that
are about threads set their own number, and those of other folders start processes as a user does."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

THREADS = "OMP_NUM_THREADS"
SHARED = "PYTEST_XDIST_WORKER" in os.environ

if SHARED:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(THREADS, "1")
        import torch  # which reads it now

        assert torch.get_num_threads() == 1

from tests.torch.owners import Owner, make_owner  # noqa: E402  (imports torch)


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if SHARED:
            patch.setenv(THREADS, "1")
        yield


@pytest.fixture(scope="session")
def native() -> None:
    """For tests of native code: without a compiler they are skipped. Code that does not compile fails."""
    from baton.engine.cpu.build import NoCompiler
    from baton.engine.cpu.kernel import library

    try:
        library()
    except NoCompiler as why:
        pytest.skip(str(why))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as name:  # 0700, and short enough for ipc
        yield Path(name)


@pytest.fixture
def owner(request: pytest.FixtureRequest, folder: Path) -> Iterator[Owner]:
    """Of a pool, reached by the TRANSPORT of the module."""
    made = make_owner(request.module.TRANSPORT, folder)
    yield made
    made.close()
