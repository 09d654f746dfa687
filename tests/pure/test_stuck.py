"""When a process that runs counts as stuck: all histories of beats and of the supervisor's turns."""

import os
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.stuck import PARDON_S, STARTS_S, STOPPED_S, STUCK_S, TURN_S, Awake, Silence
from baton.pulse import EVERY_S, Ear, Pulse
from baton.wire.loop import LONGEST_WAIT_S

LIMIT_S = 5.0
GAPS = (0.1, 0.9, 1.0, 3600.0)  # seconds between two turns; the last: the supervisor was stopped


def counted(gap_s: float) -> float:
    """What of a gap counts."""
    return min(gap_s, TURN_S)


def test_the_limits_are_longer_than_many_turns_of_the_loops() -> None:
    assert min(STUCK_S.values()) >= 5 * (LONGEST_WAIT_S + EVERY_S)
    assert max(STUCK_S.values()) < STARTS_S


@pytest.mark.parametrize("beats", list(product((False, True), repeat=4)))
def test_it_is_stuck_exactly_when_it_was_silent_for_the_limit_while_the_supervisor_ran(
    beats: tuple[bool, ...],
) -> None:
    """Every order of four kinds of turns, with and without a beat in each."""
    limit_s = 2.0
    for gaps in product(GAPS, repeat=len(beats)):
        awake, now = Awake(), 50.0
        silence = Silence(limit_s, awake.look(now))
        began, silent_s = False, 0.0
        for gap_s, beats_now in zip(gaps, beats, strict=True):
            now += gap_s
            at = awake.look(now)
            silent_s += counted(gap_s)
            if beats_now:
                silence.heard(at)
                began, silent_s = True, 0.0
            expected = began and silent_s >= limit_s - 1e-9
            assert bool(silence.too_long(at + 1e-9)) is expected, gaps


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_time_counts_only_while_the_supervisor_turns(gaps: list[float]) -> None:
    awake, now, seen = Awake(), 0.0, [Awake().look(7.0)]
    awake.look(now)
    for gap in gaps:
        now += gap
        seen.append(awake.look(now))
    assert seen == sorted(seen)
    assert seen[-1] <= min(now, len(gaps) * TURN_S) + 1e-6
    assert awake.look(now - 1.0) == seen[-1]  # no clock goes back, but nothing would break


@given(st.lists(st.floats(0, STOPPED_S - 0.01), max_size=30), st.floats(STOPPED_S + 0.1, 1e6))
def test_a_turn_in_which_the_supervisor_was_stopped_begins_a_pardon_and_no_other_does(
    gaps: list[float], stopped_s: float
) -> None:
    awake, now = Awake(), 0.0
    awake.look(now)
    for gap in gaps:
        now += gap
        assert awake.look(now) >= awake.pardon
    woken = awake.look(now + stopped_s)
    assert awake.pardon == woken + PARDON_S


@given(st.lists(st.floats(0, 3600), min_size=1, max_size=50), st.integers(1, 4))
def test_one_that_beats_between_looks_is_never_stuck_however_long_they_take(
    gaps: list[float], every: int
) -> None:
    awake = Awake()
    silence, now = Silence(LIMIT_S, awake.look(0.0)), 0.0
    silence.heard(0.0)
    for turn, gap in enumerate(gaps):
        now += gap
        at = awake.look(now)
        if turn % every == 0:
            silence.heard(at)
        assert silence.too_long(at) == ""


@pytest.mark.parametrize("loads_s", [0.0, 1.0, 60.0, STARTS_S - TURN_S])
def test_a_slow_start_is_no_silence(loads_s: float) -> None:
    awake, now = Awake(), 0.0
    silence = Silence(LIMIT_S, awake.look(now))
    while now < loads_s:
        now += TURN_S
        assert silence.too_long(awake.look(now)) == ""
    silence.heard(awake.seconds)
    began = now
    while not (why := silence.too_long(awake.look(now))):
        now += TURN_S
    assert now - began == LIMIT_S
    assert why == f"no sign of life for {LIMIT_S:.0f} s"


def test_a_restart_begins_anew() -> None:
    awake = Awake()
    first = Silence(LIMIT_S, awake.look(0.0))
    first.heard(0.0)
    for now in range(1, int(LIMIT_S) + 1):
        awake.look(float(now))
    assert first.too_long(awake.seconds)
    second = Silence(LIMIT_S, awake.seconds)
    for now in range(int(LIMIT_S), int(LIMIT_S + STARTS_S)):
        assert second.too_long(awake.look(float(now))) == ""
    assert second.too_long(awake.look(LIMIT_S + STARTS_S)).endswith("s after its start")


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pulse_writes_seldom_and_its_ear_hears_it_once() -> None:
    ear, clock = Ear(), Clock()
    pulse = Pulse(os.dup(ear.descriptor), clock)
    ear.inherited()
    assert not ear.heard()
    for _ in range(100):
        pulse.beat()
    assert ear.heard()
    assert not ear.heard()
    clock.now += EVERY_S - 0.01
    pulse.beat()
    assert not ear.heard()
    clock.now += 0.01
    pulse.beat()
    assert ear.heard()
    ear.close()
    clock.now += EVERY_S
    pulse.beat()  # nobody listens any more


def test_a_pipe_that_nobody_reads_holds_up_nobody() -> None:
    ear, clock = Ear(), Clock()
    pulse = Pulse(os.dup(ear.descriptor), clock)
    ear.inherited()
    for _ in range(70_000):  # more than a pipe holds
        clock.now += EVERY_S
        pulse.beat()
    assert ear.heard()
    ear.close()


def test_the_end_of_the_other_side_is_no_sign_of_life() -> None:
    ear = Ear()
    ear.inherited()
    assert not ear.heard()
    ear.close()
