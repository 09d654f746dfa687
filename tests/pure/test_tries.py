"""Tries: deaths count at one place only. All histories of a few events are compared with this rule."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.tries import (
    LOCAL_AFTER,
    MAX_GAPS,
    MAX_LOCAL,
    MAX_QUARANTINED,
    QUARANTINE_AFTER,
    Tries,
)

DEATH, NEXT, SAME = (
    "death",
    "next",
    "same",
)  # a worker died; a chunk beyond the last one, the same again


def history(events: tuple[str, ...]) -> Tries:
    tries, chunk = Tries(), 0
    for event in events:
        match event:
            case "death":
                tries.deaths += 1
            case "next":
                chunk += 1
                tries.filled(chunk * 8)
            case "same":
                tries.filled(chunk * 8)
    return tries


@pytest.mark.parametrize("length", range(9))
def test_the_deaths_since_the_last_progress_decide_whatever_came_before(length: int) -> None:
    for events in product((DEATH, NEXT, SAME), repeat=length):
        since = events[len(events) - events[::-1].index(NEXT) :] if NEXT in events else events
        deaths = since.count(DEATH)
        tries = history(events)
        assert tries.quarantined == (deaths >= 2), events
        assert tries.deadly == (deaths >= 4), events


def test_four_deaths_at_one_place_are_enough_and_three_are_not() -> None:
    assert QUARANTINE_AFTER + MAX_QUARANTINED == 4
    assert not history((DEATH,) * 3).deadly
    assert history((DEATH,) * 4).deadly
    assert not history((DEATH,) * 3 + (NEXT,) + (DEATH,) * 3).deadly


@given(st.lists(st.integers(1, 3), min_size=1, max_size=200))
def test_a_request_that_progresses_sometimes_survives_any_number_of_deaths(
    deaths: list[int],
) -> None:
    tries, length = Tries(), 5
    for count in deaths:
        for _ in range(count):
            tries.filled(length - 1)  # the prompt and all tokens are filled again: no progress
            tries.deaths += 1
            assert not tries.deadly
        length += 1
        tries.emitted(length)
        assert not tries.quarantined


def test_filling_again_what_decode_had_computed_is_no_progress() -> None:
    tries = Tries()
    tries.emitted(100)
    tries.deaths += 2
    tries.filled(99)
    assert tries.quarantined
    tries.filled(100)
    assert not tries.quarantined


def test_decode_fills_by_itself_after_two_bad_fills_and_a_token_forgives_them() -> None:
    tries = Tries()
    for count in range(1, LOCAL_AFTER + MAX_LOCAL + 1):
        tries.filled(7)  # it was filled, then arrived damaged
        tries.refills += 1
        assert tries.local == (count >= LOCAL_AFTER)
        assert tries.unfillable == (count >= LOCAL_AFTER + MAX_LOCAL)
    tries.emitted(9)
    assert not tries.local


def test_gaps_are_bounded_between_two_tokens() -> None:
    tries = Tries()
    tries.gaps = MAX_GAPS - 1
    assert not tries.garbled
    tries.emitted(9)
    tries.gaps += MAX_GAPS - 1
    assert not tries.garbled
    tries.gaps += 1
    assert tries.garbled
