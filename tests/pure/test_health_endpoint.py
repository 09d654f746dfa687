"""/livez and /readyz of routers and workers, over a real socket; a process with it: tests/cluster."""

import http.client
from collections.abc import Iterator
from contextlib import closing

import pytest

from baton.errors import InputError
from baton.health import Health, HealthServer, parse_address
from baton.wire import messages as msg
from baton.wire.node import ROUTER
from tests.patience import PATIENCE_S
from tests.pure.town import Town


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(10.0, clock)


def status(health: Health, path: str) -> int:
    return health.answer(f"GET {path} HTTP/1.1\r\n".encode())[0]


def test_a_process_is_ready_when_its_loop_says_so(health: Health) -> None:
    assert (status(health, "/livez"), status(health, "/readyz")) == (200, 503)
    health.beat("no router")
    assert health.answer(b"GET /readyz HTTP/1.1\r\n") == (503, "no router")
    health.beat()
    assert (status(health, "/livez"), status(health, "/readyz")) == (200, 200)


def test_a_loop_that_does_not_turn_is_neither_alive_nor_ready(health: Health, clock: Clock) -> None:
    health.beat()
    clock.now += 9.9
    assert (status(health, "/livez"), status(health, "/readyz")) == (200, 200)
    clock.now += 0.1
    assert (status(health, "/livez"), status(health, "/readyz")) == (503, 503)
    health.beat()
    assert status(health, "/livez") == 200


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [
        (b"GET / HTTP/1.1\r\n", 404),
        (b"GET /livez?verbose HTTP/1.1\r\n", 200),
        (b"HEAD /livez HTTP/1.0\r\n", 200),
        (b"POST /livez HTTP/1.1\r\n", 405),
        (b"", 405),
        (b"\xff\x00\r\n", 405),
        (b"GET\r\n", 405),
    ],
)
def test_every_request_gets_an_answer(health: Health, request_line: bytes, expected: int) -> None:
    assert health.answer(request_line)[0] == expected


@pytest.fixture
def server(health: Health) -> Iterator[HealthServer]:
    with closing(HealthServer("127.0.0.1:0", health)) as made:
        yield made


def test_it_answers_over_http(server: HealthServer, health: Health) -> None:
    health.beat()
    for _ in range(2):
        with closing(
            http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        ) as client:
            client.request("GET", "/readyz")
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"ok\n")


def test_an_address_in_use_is_an_error_in_words(server: HealthServer, health: Health) -> None:
    with pytest.raises(InputError, match=f"--health 127.0.0.1:{server.port}: cannot listen"):
        HealthServer(f"127.0.0.1:{server.port}", health)


@pytest.mark.parametrize("address", ["", "8081", ":8081", "host:", "host:x", "host:65536", "h:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="--health must be HOST:PORT"):
        parse_address(address)


def test_hosts_of_both_families_are_read() -> None:
    assert parse_address("10.0.0.7:81") == ("10.0.0.7", 81)
    assert parse_address("[fd00::7]:81") == ("fd00::7", 81)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_has_joined_while_a_router_knows_it(role: str) -> None:
    town = Town()
    (name,) = town.workers(role)
    worker = town.nodes[name]
    assert not worker.joined  # type: ignore[attr-defined]
    town.submit("a", range(1, 9), 3)
    town.run_all(["a"])
    assert worker.joined  # type: ignore[attr-defined]
    worker.handle(ROUTER, msg.Exited(ROUTER), town.now)
    assert not worker.joined  # type: ignore[attr-defined]
