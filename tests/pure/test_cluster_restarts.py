"""When a process that died is started again: a table, and rules that hold for every history."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.restarts import BACK_OFF_S, CRASH_LOOP, FORGIVE_S, Restarts

LIVES = st.lists(
    st.tuples(st.floats(0, 1000), st.none() | st.floats(0, 1000)), min_size=1, max_size=40
)
"""Of each life: seconds until it serves, and seconds it serves then; None: it never does."""


def delays(lives: list[tuple[float, float | None]]) -> tuple[list[float], Restarts]:
    """Seconds from each death to the next start."""
    restarts, now, found = Restarts(), 0.0, []
    for loading_s, service_s in lives:
        restarts.started()
        now += loading_s
        if service_s is not None:
            restarts.serves(now)
            now += service_s
        found.append(restarts.died(now))
        assert restarts.due == now + found[-1]
        now = restarts.due
    return found, restarts


@pytest.mark.parametrize(
    ("life", "expected"),
    [
        ((2.0, None), [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]),  # it dies at every start
        ((300.0, None), [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]),  # ... of a model that loads slowly
        ((2.0, 0.0), [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]),  # ... as soon as it serves
        ((2.0, FORGIVE_S), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),  # killed now and then
        ((2.0, 3600.0), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_wait_grows_with_each_death_without_service(
    life: tuple[float, float | None], expected: list[float]
) -> None:
    assert delays([life] * 10)[0] == expected


def test_service_takes_back_one_step_at_a_time() -> None:
    bad, good = (1.0, None), (1.0, 2 * FORGIVE_S)
    assert delays([bad] * 6 + [good] * 3 + [bad])[0] == [0, 0.5, 1, 2, 4, 8, 4, 2, 1, 2]


@given(LIVES)
def test_a_wait_is_one_of_the_steps_and_grows_by_one_at_most(
    lives: list[tuple[float, float | None]],
) -> None:
    found, restarts = delays(lives)
    steps = [BACK_OFF_S.index(each) for each in found]
    assert steps[0] == 0
    assert all(later <= earlier + 1 for earlier, later in pairwise(steps))
    assert restarts.down
    assert not restarts.serving


@given(LIVES, st.integers(1, 30))
def test_after_enough_service_everything_is_forgotten(
    lives: list[tuple[float, float | None]], more: int
) -> None:
    calm = (1.0, FORGIVE_S * len(BACK_OFF_S))
    found, restarts = delays([*lives, calm] + [(0.0, None)] * more)
    assert found[len(lives)] == 0
    assert found[len(lives) :] == delays([(0.0, None)] * (more + 1))[0]
    assert restarts.deaths == more + 1


@given(LIVES, st.integers(CRASH_LOOP, 30))
def test_starts_that_fail_one_after_the_other_are_a_crash_loop_and_the_longest_wait_stays(
    lives: list[tuple[float, float | None]], failures: int
) -> None:
    found, restarts = delays(lives + [(5.0, None)] * failures)
    assert restarts.crash_loop
    if failures >= len(BACK_OFF_S):
        assert restarts.at_the_longest
        assert found[-1] == BACK_OFF_S[-1]


def test_ending_when_told_to_is_no_death() -> None:
    restarts = Restarts()
    for now in range(0, 100, 2):
        restarts.started()
        restarts.serves(now)
        restarts.left(now + 1)
        assert restarts.due == now + 1
        assert (restarts.deaths, restarts.down, restarts.serving) == (0, False, False)
    assert restarts.died(100.0) == 0


def test_it_is_down_from_its_death_until_it_serves_again() -> None:
    restarts = Restarts()
    assert not restarts.down
    restarts.died(1.0)
    restarts.started()
    assert restarts.down
    restarts.serves(3.0)
    assert not restarts.down
    restarts.serves_no_more(4.0)  # its router died
    assert not restarts.down


def test_only_the_first_report_of_service_counts() -> None:
    restarts = Restarts()
    restarts.died(0.0)
    restarts.started()
    for now in range(1, 1 + 10 * int(FORGIVE_S)):  # a report a second
        restarts.serves(float(now))
    assert restarts.died(1 + 10 * FORGIVE_S) == 0


def test_recent_deaths_are_those_of_the_last_minute() -> None:
    restarts = Restarts()
    for now in (0.0, 10.0, 59.0):
        restarts.died(now)
    assert [restarts.recent_deaths(now) for now in (59.5, 60.0, 70.0, 119.0)] == [3, 2, 1, 0]
    assert restarts.deaths == 3
