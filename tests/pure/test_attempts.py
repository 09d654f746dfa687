"""A request that is submitted again, because its router was lost, is one request in the metrics."""

from collections.abc import Callable

import pytest

from baton.client.aio import RouterClient
from baton.client.attempts import Attempt, Attempts
from baton.client.tracker import RequestTracker, Update
from baton.params import GenerationParams
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.wire.messages import Finished, Message, Observed, Submit
from baton.wire.node import ROUTER
from router.observers import EVENTS_S
from tests.pure.test_exposition import value
from tests.pure.town import Town

PROMPT = (5, 6, 7, 8, 9, 10)
LENGTH = 12
OUTAGE_S = 5.0


class Server:
    """A server's tracker, monitor and metrics, as a client of a town."""

    def __init__(self) -> None:
        self.town, self.metrics = Town(), Metrics("m")
        client = RouterClient("ipc:///nowhere")
        self.tracker = client._tracker = RequestTracker(0.0, observe=True)
        self.monitor = Monitor(client, self.metrics)
        self.finished: list[str] = []
        self.seen: list[str] = []  # ids of first tokens and ends, as the router told them
        self.town.before = self.hear
        self.until(lambda: self.tracker.info is not None and self.tracker.info.ready)

    def hear(self, sender: str, receiver: str, message: Message) -> None:
        if receiver != "client":
            return
        if isinstance(message, Observed):
            self.seen += [f"{each.request} first" for each in message.first]
            self.seen += [f"{each.request} {each.reason}" for each in message.ended]
            self.monitor.observed(message)
        for event in self.tracker.received(message, self.town.now):
            if isinstance(event, Update) and isinstance(event.news, Finished):
                self.finished.append(event.news.request)
        self.send()

    def send(self) -> None:
        for message in self.tracker.messages_to_send():
            self.town.client(message)

    def turn(self) -> None:
        self.tracker.tick(self.town.now)
        self.send()
        self.town.turn()
        self.town.now += EVENTS_S  # so that each event is told before the next

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(2000):
            if done():
                return
            self.turn()
        raise AssertionError(self.seen)

    def submit(self, name: str) -> None:
        submit = Submit(name, PROMPT, GenerationParams(LENGTH))
        self.tracker.submit(submit, now=self.town.now)
        self.send()

    def told(self, what: str) -> bool:
        return what in self.seen

    def check_one(self, requests: int = 1) -> None:
        """All that is counted once for a request is counted so."""
        for name in (
            "time_to_first_token_seconds_count", "request_queue_time_seconds_count",
            "request_prefill_kv_computed_tokens_count", "e2e_request_latency_seconds_count",
        ):  # fmt: skip
            assert value(self.metrics, name) == requests, name
        for name in ("prompt_tokens_total", "prefix_cache_queries_total"):
            assert value(self.metrics, name) == requests * len(PROMPT), name
        assert value(self.metrics, "request_success_total", finished_reason="length") == requests
        assert value(self.metrics, "request_failure_total", reason="abort") == 0
        assert not self.metrics._first


@pytest.mark.parametrize("losses", [1, 2])
def test_its_first_token_and_its_end_are_observed_once(losses: int) -> None:
    server = Server()
    server.submit("r")
    for attempt in range(losses):
        server.until(lambda: server.told(f"r.{attempt} first" if attempt else "r first"))  # noqa: B023
        server.town.kill(ROUTER)
        server.tracker.connection_lost(server.town.now, "gone")
    server.until(lambda: server.told(f"r.{losses} length"))
    assert server.finished == ["r"]
    assert server.told(f"r.{losses} first")
    server.check_one()


def test_the_attempt_that_the_same_router_aborts_is_no_end() -> None:
    server = Server()
    server.submit("r")
    server.until(lambda: server.told("r first"))
    server.tracker.connection_lost(server.town.now, "cut")
    server.until(lambda: server.told("r.1 length"))
    assert server.told("r abort")
    server.check_one()


def test_what_it_waited_before_counts() -> None:
    server = Server()
    server.submit("r")
    server.town.kill(ROUTER)
    server.tracker.connection_lost(server.town.now, "gone")
    server.town.now += OUTAGE_S
    server.until(lambda: server.told("r.1 length"))
    server.check_one()
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert (value(server.metrics, f"{name}_seconds_sum") or 0.0) >= OUTAGE_S, name
    assert (value(server.metrics, "request_inference_time_seconds_sum") or 0.0) < OUTAGE_S


def test_another_clients_requests_are_what_it_sends_and_leave_nothing() -> None:
    server = Server()
    for name in ("x", "y"):
        other = Submit(name, PROMPT, GenerationParams(LENGTH))
        server.town.client(other, "other")
    server.until(lambda: server.told("x first") and server.told("y first"))
    server.town.kill(ROUTER)
    server.tracker.connection_lost(server.town.now, "gone")
    server.until(lambda: server.tracker.info is not None and server.tracker.info.ready)
    server.town.client(Submit("x.1", PROMPT, GenerationParams(LENGTH)), "other")
    server.until(lambda: server.told("x.1 length"))
    assert value(server.metrics, "time_to_first_token_seconds_count") == 3
    assert value(server.metrics, "request_success_total", finished_reason="length") == 1
    assert not server.metrics._first


def test_ids_of_requests_that_are_gone_are_forgotten() -> None:
    attempts = Attempts()
    attempts.replaced([("a", "a.1", 1.0), ("b", "b.1", 2.0)])
    attempts.replaced([("a.1", "a.2", 3.0)])
    assert attempts.of("a") == Attempt("a", 0.0, current=False)
    assert attempts.of("a.1") == Attempt("a", 1.0, current=False)
    assert attempts.of("a.2") == Attempt("a", 3.0)
    assert attempts.of("b.1") == Attempt("b.1")
    attempts.forget("a.1")  # its name is given again
    assert attempts.of("a.1") == Attempt("a.1")
