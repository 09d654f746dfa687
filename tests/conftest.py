"""What all tests share: hypothesis finds the same examples every time, and no example has a clock;
and signals are what they are in a terminal, also where the tests run in the background (nohup, CI):
there they are ignored, and every process started from here would inherit that. What is compiled for
tests is kept beside pytest's own cache; bytecode is kept whatever the environment says, or each of some
hundred processes would compile the product again."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.order import in_order

pytest.register_assert_rewrite(  # what they check is told in full, as in a file of tests
    "tests.cluster.serving",
    *(f"tests.pure.{each}" for each in ("actors", "cuts", "desk", "listening", "looping")),
    "tests.torch.owners",
)

settings.register_profile(
    "calm",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("calm")

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache" / "home")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the tests, which take file after file in this order."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = in_order([item.nodeid.partition("::")[0] for item in items])
        items[:] = [items[number] for number in order]


def pytest_collection_finish() -> None:
    """The modules and the thousands of tests stay to the end: the collector need not look at them again
    and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a process that did not end in time comes what it had said."""
    report = yield
    late = None if call.excinfo is None else call.excinfo.value
    if isinstance(late, subprocess.TimeoutExpired):
        for name, said in (("stdout", late.stdout), ("stderr", late.stderr)):
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            report.sections.append((f"{name} of the process", text or "(nothing)"))
    return report


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A test that runs a command installs its signal handlers. The next test finds the usual ones."""
    handlers = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for each, handler in handlers.items():
        signal.signal(each, handler)
