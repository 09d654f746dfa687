"""Native code, compiled before any deadline begins; and a whole server, as several files want one."""

import signal
from collections.abc import Generator, Iterator
from contextlib import suppress

import pytest

from baton.engine.cpu.build import KERNEL, NoNative, build, program_sources
from tests.cluster.processes import OPENED, short_folder, terminals
from tests.cluster.serving import Server

LAST_WORDS = 4000  # characters


@pytest.fixture(scope="session", autouse=True)
def native_code() -> None:
    """In a fresh checkout it is compiled now: it would take half of what a test gives its processes."""
    with suppress(NoNative):  # then they run in torch
        build(program_sources(["f32"], ["f32"]), "program-float32")
        build(KERNEL, "kernel")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure comes what the commands have said that the test had typed."""
    report = yield
    if report.failed:
        for each in OPENED:
            report.sections.append((f"said by {each.command}", each.said[-LAST_WORDS:]))
    return report


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder, terminals() as type_in:
        served = Server(type_in, folder)
        yield served
        served.client.close()
        served.terminal.signal(signal.SIGTERM)
        served.terminal.ends(0)
        assert "Traceback" not in served.said
        assert list(folder.glob("baton-*")) == []
