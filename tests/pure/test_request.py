"""What a model can answer, and what is refused with the value, the limit and the way out."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import RequestError
from baton.request import (
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    Limits,
    Request,
    check_request,
    checked_sampling,
)
from sampler.params import SamplingParams

LIMITS = Limits(context=100, vocabulary=50)
GOOD = Request("r", "c", (1, 2, 3), 10, {}, (), ())


def refusal(**changes: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check_request(dataclasses.replace(GOOD, **changes), LIMITS)
    return caught.value


def test_a_good_request_passes() -> None:
    check_request(GOOD, LIMITS)
    check_request(dataclasses.replace(GOOD, prompt_ids=(0,) * 90), LIMITS)
    check_request(dataclasses.replace(GOOD, stop=("x" * MAX_STOP_CHARACTERS,) * MAX_STOPS), LIMITS)


def test_allowed_ids_must_leave_something_to_draw() -> None:
    wire = SamplingParams(allowed_token_ids=(4, 7)).to_wire()
    told = {
        "allowed token id 50 ": {"sampling": SamplingParams(allowed_token_ids=(4, 50)).to_wire()},
        "a grammar may exclude": {"sampling": wire, "grammar": '{"kind":"json"}'},
        "every allowed token id ends": {"sampling": wire, "stop_ids": (7, 4), "min_tokens": 1},
    }
    for words, changes in told.items():
        assert words in str(refusal(**changes))
    check_request(dataclasses.replace(GOOD, sampling=wire, stop_ids=(7,), min_tokens=1), LIMITS)
    check_request(dataclasses.replace(GOOD, sampling=wire, stop_ids=(7, 4)), LIMITS)


def test_an_empty_prompt_is_refused() -> None:
    assert "prompt is empty" in str(refusal(prompt_ids=()))


@pytest.mark.parametrize("wanted", [0, -1, -(2**63)])
def test_no_tokens_cannot_be_asked_for(wanted: int) -> None:
    assert f"at least 1, got {wanted}" in str(refusal(max_new_tokens=wanted))


def test_more_than_the_context_is_refused_with_all_three_numbers() -> None:
    error = refusal(prompt_ids=(1,) * 95)
    assert error.code == "context_length_exceeded"
    assert "95 tokens and 10 new ones" in str(error)
    assert "context is 100; shorten one of them by 5" in str(error)
    assert refusal(max_new_tokens=2**63 - 1).code == "context_length_exceeded"


@pytest.mark.parametrize("bad", [-1, 50, 2**31, 2**63 - 1])
def test_ids_outside_the_vocabulary_are_refused_by_value(bad: int) -> None:
    assert f"token id {bad} is outside the vocabulary of 50" in str(refusal(prompt_ids=(1, bad)))


def test_stop_strings_are_few_short_and_not_empty() -> None:
    assert "at most 4 stop strings, got 5" in str(refusal(stop=("a",) * 5))
    assert "1 to 256 characters" in str(refusal(stop=("",)))
    assert "1 to 256 characters" in str(refusal(stop=("a" * 257,)))


@given(st.integers(1, 120), st.integers(-5, 120))
def test_what_passes_fits_the_context_and_what_fits_passes(prompt: int, wanted: int) -> None:
    request = dataclasses.replace(GOOD, prompt_ids=(1,) * prompt, max_new_tokens=wanted)
    fits = wanted >= 1 and prompt + wanted <= LIMITS.context
    try:
        check_request(request, LIMITS)
    except RequestError:
        assert not fits
    else:
        assert fits


def test_no_wish_takes_the_models_own_way_of_sampling() -> None:
    default = SamplingParams(temperature=0.5).to_wire()
    assert checked_sampling(None, default) is default
    assert checked_sampling({}, default) == SamplingParams().to_wire()


@pytest.mark.parametrize(
    "wanted", [{"temperature": -1}, {"temperature": "hot"}, {"top_p": float("nan")}, {"tops": 1}]
)
def test_a_wrong_wish_is_refused_by_name(wanted: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(wanted))):
        checked_sampling(wanted, {})
