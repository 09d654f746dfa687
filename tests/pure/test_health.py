"""From beats to alive, suspect, dead."""

from hypothesis import given
from hypothesis import strategies as st

from router.health import BEAT_S, MISSED_BEATS, Health, Pulse

SILENT = MISSED_BEATS * BEAT_S


def test_three_missed_beats_are_suspect_and_more_than_the_longest_step_is_dead() -> None:
    pulse = Pulse(100.0, patience_s=10.0)
    assert pulse.judge(100.0 + SILENT - 0.001) is Health.ALIVE
    assert pulse.judge(100.0 + SILENT) is Health.SUSPECT
    assert pulse.judge(100.0 + SILENT + 9.999) is Health.SUSPECT
    assert pulse.judge(100.0 + SILENT + 10.0) is Health.DEAD


def test_a_worker_without_patience_goes_from_alive_to_dead() -> None:
    pulse = Pulse(0.0, patience_s=0.0)
    assert pulse.judge(SILENT - 0.001) is Health.ALIVE
    assert pulse.judge(SILENT) is Health.DEAD


def test_a_sign_of_life_makes_it_alive_again() -> None:
    pulse = Pulse(0.0, patience_s=10.0)
    assert pulse.judge(5.0) is Health.SUSPECT
    pulse.last_heard = 5.0
    assert pulse.judge(5.0) is Health.ALIVE


@given(st.floats(0, 1e6), st.floats(0, 1e3), st.lists(st.floats(0, 1e4), min_size=2, max_size=6))
def test_silence_only_makes_it_worse(heard: float, patience: float, waits: list[float]) -> None:
    order = [Health.ALIVE, Health.SUSPECT, Health.DEAD]
    pulse = Pulse(heard, patience)
    verdicts = [order.index(pulse.judge(heard + wait)) for wait in sorted(waits)]
    assert verdicts == sorted(verdicts)


def test_workers_and_router_beat_at_the_same_pace() -> None:
    from baton.wire import membership

    assert membership.BEAT_S == BEAT_S
    assert membership.ROUTER_PATIENCE_S > MISSED_BEATS * BEAT_S
