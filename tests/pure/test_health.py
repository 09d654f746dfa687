"""From beats to alive, suspect, dead."""

from hypothesis import given
from hypothesis import strategies as st

from baton.wire.membership import BEAT_S, ROUTER_PATIENCE_S
from router.workers import MISSED_BEATS, Health, Member
from tests.pure.test_workers import hello

SILENT = MISSED_BEATS * BEAT_S


def member(last_heard: float, *, patience_s: float) -> Member:
    return Member(hello("p1", patience_s=patience_s), last_heard)


def test_three_missed_beats_are_suspect_and_more_than_the_longest_step_is_dead() -> None:
    worker = member(100.0, patience_s=10.0)
    assert worker.health(100.0 + SILENT - 0.001) is Health.ALIVE
    assert worker.health(100.0 + SILENT) is Health.SUSPECT
    assert worker.health(100.0 + SILENT + 9.999) is Health.SUSPECT
    assert worker.health(100.0 + SILENT + 10.0) is Health.DEAD


def test_a_worker_without_patience_goes_from_alive_to_dead() -> None:
    worker = member(0.0, patience_s=0.0)
    assert worker.health(SILENT - 0.001) is Health.ALIVE
    assert worker.health(SILENT) is Health.DEAD


def test_a_sign_of_life_makes_it_alive_again() -> None:
    worker = member(0.0, patience_s=10.0)
    assert worker.health(5.0) is Health.SUSPECT
    worker.last_heard = 5.0
    assert worker.health(5.0) is Health.ALIVE


@given(st.floats(0, 1e6), st.floats(0, 1e3), st.lists(st.floats(0, 1e4), min_size=2, max_size=6))
def test_silence_only_makes_it_worse(heard: float, patience: float, waits: list[float]) -> None:
    order = [Health.ALIVE, Health.SUSPECT, Health.DEAD]
    worker = member(heard, patience_s=patience)
    verdicts = [order.index(worker.health(heard + wait)) for wait in sorted(waits)]
    assert verdicts == sorted(verdicts)


def test_a_worker_waits_longer_for_the_router_than_the_router_for_a_beat() -> None:
    assert ROUTER_PATIENCE_S > MISSED_BEATS * BEAT_S
