"""GenerationParams: what is refused, with the value, the rule and the way out."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ProtocolError, RequestError
from baton.params import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
    GenerationParams,
    Limits,
    check_request,
)
from baton.wire.codec import decode, encode
from baton.wire.messages import Submit
from sampler.params import SamplingParams

LIMITS = Limits(context=100, vocabulary=50)
PROMPT = (1, 2, 3)
GOOD = GenerationParams(10)


def refusal(prompt: tuple[int, ...] = PROMPT, **changes: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check_request(prompt, dataclasses.replace(GOOD, **changes), LIMITS)
    return caught.value


def test_a_good_request_passes() -> None:
    check_request(PROMPT, GOOD, LIMITS)
    check_request((0,) * 90, GOOD, LIMITS)
    long_stops = ("x" * MAX_STOP_CHARACTERS,) * MAX_STOPS
    check_request(PROMPT, dataclasses.replace(GOOD, stop=long_stops), LIMITS)


def test_allowed_ids_must_leave_something_to_draw() -> None:
    sampling = SamplingParams(allowed_token_ids=(4, 7))
    words: dict[str, dict[str, Any]] = {
        "allowed token id 50 ": {"sampling": SamplingParams(allowed_token_ids=(4, 50))},
        "logit_bias id 50 ": {"sampling": SamplingParams(logit_bias=((4, 1.0), (50, 1.0)))},
        "a grammar may exclude": {"sampling": sampling, "grammar": '{"kind":"json"}'},
        "every allowed token id ends": {
            "sampling": sampling, "stop_token_ids": (7, 4), "min_tokens": 1,
        },
    }  # fmt: skip
    for each, changes in words.items():
        assert each in str(refusal(**changes))
    ok = dataclasses.replace(GOOD, sampling=sampling, stop_token_ids=(7,), min_tokens=1)
    check_request(PROMPT, ok, LIMITS)
    check_request(PROMPT, dataclasses.replace(ok, stop_token_ids=(7, 4), min_tokens=0), LIMITS)


def test_an_empty_prompt_is_refused() -> None:
    assert "prompt is empty" in str(refusal(prompt=()))


@pytest.mark.parametrize("wanted", [0, -1, -(2**63)])
def test_no_tokens_cannot_be_asked_for(wanted: int) -> None:
    assert f"at least 1, got {wanted}" in str(refusal(max_new_tokens=wanted))


def test_more_than_the_context_is_refused_with_all_three_numbers() -> None:
    error = refusal(prompt=(1,) * 95)
    assert error.code == "context_length_exceeded"
    assert "95 tokens and 10 new ones" in str(error)
    assert "context is 100; shorten one of them by 5" in str(error)
    assert refusal(max_new_tokens=2**63 - 1).code == "context_length_exceeded"


@pytest.mark.parametrize("bad", [-1, 50, 2**31, 2**63 - 1])
def test_ids_outside_the_vocabulary_are_refused_by_value(bad: int) -> None:
    assert f"token id {bad} is outside the vocabulary of 50" in str(refusal(prompt=(1, bad)))
    assert f"stop token id {bad} is outside" in str(refusal(stop_token_ids=(1, bad)))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"stop": ("a",) * 5}, "at most 4 stop strings, got 5"),
    ({"stop": ("",)}, "1 to 256 characters"),
    ({"stop": ("a" * 257,)}, "1 to 256 characters"),
    ({"stop_token_ids": (1,) * (MAX_STOP_IDS + 1)}, "at most 64 stop token ids, got 65"),
    ({"min_tokens": 11}, "min_tokens must be 0 to max_new_tokens (10), got 11"),
    ({"min_tokens": -1}, "got -1"),
    ({"logprobs": 21}, "logprobs must be -1 (none) to 20, got 21"),
    ({"prompt_logprobs": -2}, "prompt_logprobs must be -1 (none) to 20, got -2"),
    ({"stream_interval_s": 1.5}, "stream_interval_s must be 0 (at once) to 1, got 1.5"),
    ({"stream_interval_s": float("nan")}, "got nan"),
]


@pytest.mark.parametrize(("changes", "words"), BROKEN)
def test_what_no_model_could_do_is_refused_where_it_is_built(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        dataclasses.replace(GOOD, **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), BROKEN)
def test_broken_params_are_no_message(changes: dict[str, Any], words: str) -> None:
    message = Submit("r", "text", dataclasses.replace(GOOD))
    for name, value in changes.items():
        object.__setattr__(message.params, name, value)
    with pytest.raises(ProtocolError) as caught:
        decode(encode(message))
    assert words in str(caught.value)


def test_broken_sampling_is_no_message() -> None:
    message = Submit("r", "text", GenerationParams(5, SamplingParams()))
    object.__setattr__(message.params.sampling, "top_p", 2.0)
    with pytest.raises(ProtocolError, match=r"SamplingParams: top_p must be in \(0, 1\], got 2.0"):
        decode(encode(message))


@given(st.integers(1, 120), st.integers(-5, 120))
def test_what_passes_fits_the_context_and_what_fits_passes(prompt: int, wanted: int) -> None:
    fits = wanted >= 1 and prompt + wanted <= LIMITS.context
    try:
        check_request((1,) * prompt, GenerationParams(wanted), LIMITS)
    except RequestError:
        assert not fits
    else:
        assert fits


def test_what_is_resolved_stays_as_it_is() -> None:
    params = GenerationParams(5, stop_token_ids=(4, 7), stream_interval_s=0.5)
    resolved = params.resolved(SamplingParams(seed=3), (7, 9))
    assert resolved == GenerationParams(
        5, SamplingParams(seed=3), stop_token_ids=(7, 9, 4), stream_interval_s=0.5
    )
    assert resolved.resolved(SamplingParams(seed=4), (7, 9)) == resolved
