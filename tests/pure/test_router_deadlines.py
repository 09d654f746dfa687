"""Deadlines: a request that waits or runs for too long ends with a word, also in an idle router."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.lifecycle import State
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import Effect
from router.batching import Rules
from tests.pure.desk import Desk, sent
from tests.pure.town import Town, calm_answer

ALONE = Rules(batch_size=1, window_s=0.0, token_budget=64, colocated=True)


class TimedDesk(Desk):
    """A desk with one decode worker that fills by itself, and a clock that is turned."""

    def __init__(self, *, wait: float = 0.0, whole: float = 0.0) -> None:
        super().__init__("d1", rules=ALONE)
        self.wait, self.whole = wait, whole

    def ask(self, name: str, length: int = 9) -> list[Effect]:
        params = GenerationParams(length)
        times = {"queue_timeout_s": self.wait, "timeout_s": self.whole}
        return self.hear("client", msg.Submit(name, (1, 2, 3), params, **times))

    def at(self, now: float) -> list[msg.Failed]:
        """The failures of a step at this time, in which all workers are heard."""
        self.now = now
        for member in self.router.workers:
            self.hear(member.worker, msg.Heartbeat(member.hello.epoch, 1))
        found = [failed for _, failed in sent(self.step(), msg.Failed)]
        assert all(isinstance(each, msg.Failed) for each in found)
        return found  # type: ignore[return-value]

    def place(self, name: str, run: int = 0, worker: str = "d1") -> None:
        self.step()
        self.hear(worker, msg.Reserved(self.grant(f"{name}#{run}", worker)))
        self.step()
        assert self.state(name) is State.DECODING


def test_without_a_worker_a_request_waits_no_longer_than_its_queue_timeout() -> None:
    desk = TimedDesk(wait=60.0)
    desk.hear("d1", msg.Exited("d1"))
    desk.ask("a")
    assert desk.at(59.9) == []
    [failed] = desk.at(60.0)
    assert failed.code == "queue_timeout"
    assert failed.message == (
        "no worker took the request within 60 s: no decode worker has joined; 0 tokens were sent; "
        "send it again later"
    )
    assert desk.state("a") is None


def test_behind_others_it_is_told_how_many() -> None:
    desk = TimedDesk(wait=5.0)
    desk.ask("a")
    desk.place("a")
    desk.ask("b")
    desk.ask("c")
    first, second = desk.at(5.0)
    assert (first.request, second.request) == ("b", "c")
    assert "within 5 s: all are busy (1 running, 2 waiting)" in first.message


@pytest.mark.parametrize("granted", [False, True])
def test_the_wait_ends_when_blocks_are_granted_not_when_they_are_asked_for(granted: bool) -> None:
    desk = TimedDesk(wait=5.0)
    desk.ask("a")
    desk.step()
    if granted:
        desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    assert bool(desk.at(5.0)) == (not granted)
    assert (desk.state("a") is None) == (not granted)


def test_a_request_that_was_asked_for_and_is_late_gives_its_blocks_back() -> None:
    desk = TimedDesk(wait=5.0)
    desk.ask("a")
    desk.step()
    desk.now = 5.0
    assert sent(desk.step(), msg.Cancel) == [("d1", msg.Cancel("a#0"))]


def test_a_request_does_not_take_longer_than_its_timeout() -> None:
    desk = TimedDesk(whole=5.0)
    desk.ask("a")
    desk.place("a")
    tokens = msg.RunTokens("a#0", 3, (5, 6, 7))
    desk.hear("d1", msg.Decoded((tokens,)))
    assert desk.at(4.9) == []
    desk.now = 5.0
    effects = desk.step()
    why = "the request did not end within 5 s; 3 tokens were sent"
    assert sent(effects, msg.Failed) == [("client", msg.Failed("a", "deadline_exceeded", why))]
    assert sent(effects, msg.Cancel) == [("d1", msg.Cancel("a#0"))]


def test_a_lost_request_waits_anew_and_not_for_ever() -> None:
    desk = TimedDesk(wait=60.0)
    desk.ask("a")
    desk.place("a")
    desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 3, (5,)),)))
    desk.at(100.0)
    desk.hear("d1", msg.Exited("d1"))
    assert desk.at(159.9) == []
    [failed] = desk.at(160.0)
    assert failed.code == "queue_timeout"
    assert "took the request again within 60 s: no decode worker has joined" in failed.message
    assert "1 token was sent" in failed.message


def test_a_preempted_request_has_no_queue_timeout_until_a_worker_dies() -> None:
    desk = TimedDesk(wait=60.0)
    desk.ask("a")
    desk.place("a")
    desk.hear("d1", msg.Preempted("a#0"))
    assert desk.router.due(desk.now) < inf
    assert desk.at(100.0) == []
    desk.hear("d1", msg.Exited("d1"))
    desk.at(100.1)
    assert desk.at(159.9) == []
    [failed] = desk.at(160.2)
    assert failed.code == "queue_timeout"


def test_a_request_whose_run_was_useless_waits_anew() -> None:
    """Its tokens did not arrive, and then there is no room for it any more."""
    desk = TimedDesk(wait=60.0)
    desk.ask("a")
    desk.place("a")
    desk.at(100.0)
    desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 9, (5,)),)))
    for second in range(1, 60):
        assert desk.at(100.0 + second) == []
        desk.hear("d1", msg.Deferred(f"a#{second}"))
    [failed] = desk.at(160.0)
    assert failed.code == "queue_timeout"


def test_a_request_that_no_prefill_worker_can_fill_any_more_does_not_wait() -> None:
    """Its decode worker is out of reach of the new prefill worker, so it fills the prompt itself."""
    desk = Desk("d1", "p1")
    desk.hear("client", msg.Submit("a", (1, 2, 3), GenerationParams(4), queue_timeout_s=60.0))
    desk.step()
    desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    assert desk.router.ledger.deadlines.due(0.0) == inf
    desk.hear("p1", msg.Exited("p1"))
    desk.join("p2")
    desk.hear("p2", msg.AttachFailed("d1", "d1/0", "no way"))
    desk.step()
    assert desk.state("a") is State.DECODING
    assert desk.router.ledger.deadlines.due(0.0) == inf


def test_the_time_for_the_whole_request_goes_on_whatever_happens_to_it() -> None:
    desk = TimedDesk(wait=60.0, whole=70.0)
    desk.ask("a")
    desk.place("a")
    desk.at(30.0)
    desk.hear("d1", msg.Exited("d1"))
    [failed] = desk.at(70.0)
    assert failed.code == "deadline_exceeded"


@pytest.mark.parametrize(("wait", "whole"), [(2.5, 0.0), (0.0, 2.5), (90.0, 2.5), (2.5, 90.0)])
def test_an_idle_router_wakes_up_by_itself(wait: float, whole: float) -> None:
    """Nothing but its own due() moves the clock: no worker, no message, no client that asks."""
    desk = TimedDesk(wait=wait, whole=whole)
    desk.hear("d1", msg.Exited("d1"))
    desk.ask("a")
    failures: list[object] = []
    while not failures:
        failures = sent(desk.step(), msg.Failed)
        assert desk.now <= 2.5
        last, desk.now = desk.now, desk.now + max(desk.router.due(desk.now), 1e-6)
    assert last == pytest.approx(2.5)


def test_no_limit_is_no_deadline_and_what_ended_has_none() -> None:
    desk = TimedDesk(wait=5.0, whole=5.0)
    desk.ask("a")
    desk.ask("b")
    desk.ask("c")
    desk.place("a")
    desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 3, (5,), "length"),)))
    desk.hear("client", msg.Abort("b"))
    desk.hear("client", msg.Exited("client"))
    assert desk.router.ledger.deadlines.due(0.0) == inf
    desk.wait = desk.whole = 0.0
    desk.ask("d")
    assert desk.router.ledger.deadlines.due(0.0) == inf
    assert desk.at(1e9) == []


REQUEST = st.tuples(
    st.sampled_from([0.0, 0.02, 0.3, 50.0]), st.sampled_from([0.0, 0.02, 0.3, 50.0])
)


@settings(max_examples=30, deadline=None)
@given(st.lists(REQUEST, min_size=1, max_size=12), st.integers(0, 3))
def test_in_a_busy_cluster_every_request_has_one_end_in_its_time(
    limits: list[tuple[float, float]], kills: int
) -> None:
    """One request at a time, tokens as the town's clock goes; workers die between."""
    town = Town(rules=Rules(batch_size=1, window_s=0.0, token_budget=64))
    ended: dict[str, float] = {}
    for index, (wait, whole) in enumerate(limits):
        params = GenerationParams(30)
        town.client(
            msg.Submit(f"r{index}", (index + 1, 2), params, queue_timeout_s=wait, timeout_s=whole)
        )
    for turn in range(20_000):
        if turn in range(40, 40 + 40 * kills, 40):
            for name in town.workers("decode"):
                town.kill(name)
        town.turn()
        for name, outcome in town.outcomes.items():
            if outcome.ends:
                ended.setdefault(name, town.now)
        if len(ended) == len(limits):
            break
    for index, (wait, whole) in enumerate(limits):
        outcome = town.outcomes[f"r{index}"]
        tokens, reason = calm_answer((index + 1, 2), 30)
        assert len(outcome.ends) == 1
        assert outcome.tokens == tokens[: len(outcome.tokens)]
        allowed = {reason, *["queue_timeout"] * (wait > 0), *["deadline_exceeded"] * (whole > 0)}
        assert outcome.ends[0] in allowed
        assert not whole or ended[f"r{index}"] <= whole + 0.05
        if outcome.ends == [reason]:
            assert outcome.tokens == tokens
    town.settle()
