"""SamplingParams: what it takes, what it refuses, and how it travels."""

import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.params import GenerationParams
from baton.wire.codec import decode, encode
from baton.wire.messages import Submit
from sampler.params import MOST_ALLOWED, MOST_BIASES, RULES, SamplingParams
from tests.patience import PATIENCE_S

NAN, INF = float("nan"), float("inf")

biases = st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=20)
valid_params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(-1, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(1e-30, 1e30),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=biases.map(lambda chosen: tuple(chosen.items())),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 2**31 - 1),
)


@given(valid_params)
def test_params_survive_the_wire(params: SamplingParams) -> None:
    message = Submit("r", "p", GenerationParams(1, params))
    assert decode(encode(message)) == message


def test_biases_and_allowed_ids_are_taken_as_lists_too() -> None:
    params = SamplingParams(logit_bias=[[50256, -100], [13, 0.1]])  # type: ignore[arg-type]
    assert params == SamplingParams(logit_bias=((50256, -100.0), (13, 0.1)))
    params = SamplingParams(allowed_token_ids=[7, 2, 7])  # type: ignore[arg-type]
    assert params == SamplingParams(allowed_token_ids=(2, 7))


def test_as_many_as_are_allowed_survive_the_wire() -> None:
    most = tuple((token, 2.0**-1074) for token in range(2**31 - MOST_BIASES, 2**31))
    ids = tuple(range(2**31 - MOST_ALLOWED, 2**31))
    params = SamplingParams(logit_bias=most, allowed_token_ids=ids)
    message = Submit("r", "p", GenerationParams(1, params))
    assert decode(encode(message)) == message


TOO_MANY = [(token, 0.0) for token in range(MOST_BIASES + 1)]
REFUSED: dict[str, list[object]] = {
    "temperature": [-0.1, 2.01, NAN, INF, -INF, True, "1", None, 1j],
    "top_k": [-2, 2**31, 10**400, 1.0, True, "5", None],
    "top_p": [0, 0.0, -0.5, 1.0001, NAN, INF, False, "0.9", None, []],
    "min_p": [-0.1, 1.1, NAN, INF, True, "0", None],
    "repetition_penalty": [0, -1.0, NAN, INF, 1e-40, 10**400, True, "1", None],
    "presence_penalty": [-2.1, 2.0001, NAN, INF, True, "0", None],
    "frequency_penalty": [-2.1, 2.0001, NAN, INF, True, "0", None],
    "logit_bias": [
        None, 5, {5: 1.0}, b"5:1", TOO_MANY, [5], [(5,)], [(5, 1.0, 2.0)], ["51"],
        [(-1, 1.0)], [(2**31, 1.0)], [(10**400, 1.0)], [(True, 1.0)], [(5.0, 1.0)], [("5", 1.0)],
        [(5, -100.1)], [(5, 100.1)], [(5, NAN)], [(5, INF)], [(5, "1")], [(5, True)], [(5, None)],
        [(5, 1.0), (6, 1.0), (5, 1.0)],
        "5:1", "," * 10**6,
    ],
    "allowed_token_ids": [
        5, b"5", {5}, [], (), list(range(MOST_ALLOWED + 1)), [-1], [2**31], [10**400], [True], [5.0],
        ["5"], [None], [[5]], "5", "0," * 10**6,
    ],
    "seed": [2**63, -(2**63) - 1, 1.0, True, "7" * 999, None],
    "choice": [-1, 2**31, 0.0, False, "0", None],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=lambda each: str(each)[:30],
)
def test_nonsense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got ") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_a_message_says_the_rule_and_the_value() -> None:
    with pytest.raises(ValueError, match=r"^top_p must be in \(0, 1\], got 1\.5$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ValueError, match=r"^top_k must be an integer, got True$"):
        SamplingParams(top_k=True)
    for pairs, message in (
        (TOO_MANY, "at most 1,024 pairs, got 1,025"),
        ([(7, NAN)], r"numbers in \[-100, 100\], got nan for token id 7"),
        ([(-7, 1.0)], r"for token ids in \[0, 2\*\*31\), got -7"),
        ([(7, 1.0), (7, 1.0)], "one number for a token id, got two for 7"),
        ([7], "pairs of a token id and a bias, got 7"),
    ):
        with pytest.raises(ValueError, match=f"^logit_bias must be {message}$"):
            SamplingParams(logit_bias=pairs)  # type: ignore[arg-type]


def test_every_field_has_a_rule() -> None:
    assert {field.name for field in fields(SamplingParams)} == set(REFUSED)
    assert set(REFUSED) == {*RULES, "logit_bias", "allowed_token_ids"}


def test_what_is_not_asked_for_changes_no_logit() -> None:
    params = SamplingParams()
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.0, 0.0, ())
    assert params.allowed_token_ids is None


def test_missing_fields_have_openai_defaults() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.greedy) == (1.0, 1.0, 0, False)


def test_whole_numbers_are_numbers_and_travel_as_floats() -> None:
    params = SamplingParams(temperature=1, top_p=1)
    assert params == SamplingParams()
    assert type(params.temperature) is float
    biased = SamplingParams(logit_bias=[[5, 1]])  # type: ignore[arg-type]
    assert biased == SamplingParams(logit_bias=((5, 1.0),))
    assert hash(biased) == hash(SamplingParams(logit_bias=((5, 1.0),)))


def test_minus_one_turns_top_k_off() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_a_tiny_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=0.99e-5).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_a_generation_config_without_do_sample_is_greedy() -> None:
    config = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "eos_token_id": [1, 2]}
    expected = SamplingParams(temperature=0, repetition_penalty=1.1)
    assert SamplingParams.from_generation_config(config) == expected
    assert SamplingParams.from_generation_config({**config, "do_sample": False}) == expected
    assert SamplingParams.from_generation_config({}).greedy


def test_a_sampling_generation_config_is_read() -> None:
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    expected = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    assert SamplingParams.from_generation_config(config) == expected


def test_absent_and_null_fields_take_the_defaults_of_transformers() -> None:
    expected = SamplingParams(top_k=50)
    assert SamplingParams.from_generation_config({"do_sample": True}) == expected
    nulls = {"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    assert SamplingParams.from_generation_config(nulls) == expected
    assert SamplingParams.from_generation_config({"do_sample": True, "top_k": 0}).top_k == 0


@pytest.mark.parametrize("config", [{"do_sample": "false"}, {"do_sample": True, "top_p": "0.9"}])
def test_a_broken_generation_config_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SamplingParams.from_generation_config(config)


def test_params_do_not_load_torch() -> None:
    code = "import sys, sampler, sampler.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S).returncode == 0
