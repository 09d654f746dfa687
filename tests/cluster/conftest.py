"""A whole server, as several files want one."""

import signal
from collections.abc import Iterator

import pytest

from tests.cluster.processes import short_folder, terminals
from tests.cluster.serving import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder, terminals() as type_in:
        served = Server(type_in, folder)
        yield served
        served.client.close()
        served.terminal.signal(signal.SIGTERM)
        served.terminal.ends(0, 20)
        assert "Traceback" not in served.said
        assert list(folder.glob("baton-*")) == []
