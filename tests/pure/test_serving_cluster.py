"""Waiting for a server in front of a cluster: the cluster is looked after meanwhile."""

import itertools
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from baton.client.blocking import Notice
from baton.clock import monotonic
from baton.cluster.serving import READY_S, ServingCluster, _await_server
from baton.errors import BatonError


class Ready(BaseHTTPRequestHandler):
    """Not at first."""

    statuses: Iterator[int]

    def do_GET(self) -> None:
        self.send_response(next(self.statuses))
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


class PretendClient:
    """Whose polls return these notices."""

    def __init__(self, polls: Iterator[list[Notice]]) -> None:
        self._polls = polls

    def poll(self, timeout_s: float) -> list[Notice]:
        return next(self._polls)


def serving(
    listener: socket.socket, polls: Iterator[list[Notice]], said: list[str]
) -> ServingCluster:
    return ServingCluster(listener.getsockname()[1], None, PretendClient(polls), said.append)  # type: ignore[arg-type]


def test_a_server_that_died_at_its_start_is_replaced_and_waited_for(
    listener: socket.socket,
) -> None:
    """Nobody answers at the socket until supervise() has started somebody."""
    Ready.statuses = iter([503, 503, 200])
    server = HTTPServer(listener.getsockname(), Ready, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    thread = threading.Thread(target=server.serve_forever)

    def polls() -> Iterator[list[Notice]]:
        for turn in itertools.count():
            if turn == 2:
                thread.start()
                yield [Notice("server died and is started again")]
            yield []

    said: list[str] = []
    _await_server(serving(listener, polls(), said), monotonic)
    server.shutdown()
    thread.join()
    assert said == ["server died and is started again"]
    assert list(Ready.statuses) == []


def test_a_server_that_never_comes_is_given_up(listener: socket.socket) -> None:
    times = itertools.count(0.0, READY_S / 4)
    with pytest.raises(BatonError, match="not ready in 120 s"):
        _await_server(serving(listener, itertools.repeat(list[Notice]()), []), lambda: next(times))
