"""Joining a router, beating, starting anew: what every worker shares."""

import pytest

from baton.kv.region import Region
from baton.wire import messages as msg
from baton.wire.membership import BEAT_S, KNOCK_S, ROUTER_PATIENCE_S, Membership
from baton.wire.node import ROUTER, Stop, To, Watch

HELLO = msg.Hello(
    "decode",
    "d",
    "d/0",
    msg.PROTOCOL,
    "here",
    11,
    "cpu",
    "m",
    "float32",
    "l",
    4,
    32,
    8,
    (),
    1.0,
    0.0,
)
WELCOME = msg.Welcome("router/1", "here", 99)


class Worker:
    """A membership, and what it started anew."""

    def __init__(self) -> None:
        self.epochs: list[str] = []
        self.membership = Membership(HELLO, self._start_anew)

    def _start_anew(self, epoch: str) -> tuple[Region, ...]:
        self.epochs.append(epoch)
        return (Region("shm", "l", 8, {"path": epoch}),)

    def joined(self, now: float = 0.0) -> "Worker":
        self.membership.step(now)
        self.membership.handle(WELCOME, now)
        return self


def hellos(effects: list[object] | None) -> list[msg.Hello]:
    assert effects is not None
    found = [e.message for e in effects if isinstance(e, To)]
    return [message for message in found if isinstance(message, msg.Hello)]


def test_it_knocks_until_it_is_let_in() -> None:
    membership = Worker().membership
    assert membership.step(0.0) == [To(ROUTER, HELLO)]
    assert membership.step(KNOCK_S / 2) == []
    assert membership.due(KNOCK_S / 2) == pytest.approx(KNOCK_S / 2)
    assert membership.step(KNOCK_S) == [To(ROUTER, HELLO)]


def test_once_in_it_beats_with_a_counter_that_grows() -> None:
    membership = Worker().joined().membership
    steps = []
    for now in range(1, 5):
        for effect in membership.step(now * BEAT_S):
            assert isinstance(effect, To)
            assert isinstance(effect.message, msg.Heartbeat)
            assert effect.message.epoch == "d/0"
            steps.append(effect.message.steps)
        membership.handle(msg.Heartbeat("router/1", 1), now * BEAT_S)
    assert len(steps) == 4
    assert steps == sorted(set(steps))


def test_a_router_of_the_same_host_is_watched_and_no_other() -> None:
    assert Worker().membership.handle(WELCOME, 0.0) == [Watch(ROUTER, 99)]
    assert Worker().membership.handle(msg.Welcome("router/1", "there", 99), 0.0) == []


def test_a_refusal_ends_the_process_with_its_reason() -> None:
    (effect,) = Worker().membership.handle(msg.Refused("wrong model"), 0.0) or []
    assert isinstance(effect, Stop)
    assert effect.exit_code == 4
    assert "wrong model" in effect.why


@pytest.mark.parametrize(
    "message", [msg.Reset("given up"), msg.Exited(ROUTER), msg.Heartbeat("router/2", 1)]
)
def test_a_router_that_is_gone_or_gave_it_up_means_a_new_life(message: msg.Message) -> None:
    worker = Worker().joined()
    (hello,) = hellos(worker.membership.handle(message, 1.0))
    assert hello.epoch == "d/1"
    assert hello.regions[0].address == {"path": "d/1"}
    assert worker.epochs == ["d/1"]


def test_a_beat_of_the_router_it_knows_changes_nothing() -> None:
    worker = Worker().joined()
    assert worker.membership.handle(msg.Heartbeat("router/1", 7), 1.0) == []
    assert worker.epochs == []


def test_a_beat_before_the_welcome_changes_nothing() -> None:
    worker = Worker()
    assert worker.membership.handle(msg.Heartbeat("router/9", 7), 1.0) == []
    assert worker.epochs == []


def test_a_silent_router_is_gone_after_its_time_and_not_before() -> None:
    worker = Worker().joined()
    assert hellos(worker.membership.step(ROUTER_PATIENCE_S - 0.01)) == []
    assert [h.epoch for h in hellos(worker.membership.step(ROUTER_PATIENCE_S))] == ["d/1"]


def test_any_word_of_the_router_is_a_sign_of_life() -> None:
    worker = Worker().joined()
    assert worker.membership.handle(msg.Drop("r#0"), 4.0) is None  # about work, not about this
    assert hellos(worker.membership.step(ROUTER_PATIENCE_S + 1.0)) == []


def test_each_life_has_its_own_name() -> None:
    worker = Worker()
    for life in range(1, 4):
        worker.joined()
        worker.membership.handle(msg.Reset(""), 0.0)
        assert worker.epochs[-1] == f"d/{life}"


def test_after_starting_anew_it_knocks_again() -> None:
    worker = Worker().joined()
    worker.membership.handle(msg.Reset(""), 1.0)
    assert worker.membership.step(1.0) == []
    assert [h.epoch for h in hellos(worker.membership.step(1.0 + KNOCK_S))] == ["d/1"]


@pytest.mark.parametrize("message", [msg.Exited("p"), msg.WriterClear("p"), msg.Cancel("r#0")])
def test_what_is_about_work_is_left_to_the_worker(message: msg.Message) -> None:
    assert Worker().joined().membership.handle(message, 1.0) is None


def test_many_resets_in_a_row_are_one_new_life() -> None:
    worker = Worker().joined()
    for _ in range(5):
        worker.membership.handle(msg.Reset("given up"), 1.0)
    assert worker.epochs == ["d/1"]


@pytest.mark.parametrize("news", [msg.WriterClear("p"), msg.WriterJoined("p", "here", 7, "shm")])
def test_news_of_writers_that_is_older_than_the_epoch_is_ignored(news: msg.Message) -> None:
    worker = Worker().joined()
    worker.membership.handle(msg.Reset(""), 1.0)
    assert worker.membership.handle(news, 1.0) == []
    worker.membership.handle(WELCOME, 1.0)
    assert worker.membership.handle(news, 1.0) is None
