"""From what a client sent to a request, or to a refusal in words."""

from typing import Any

import pytest

from baton.errors import RequestError
from baton.params import GenerationParams, Limits
from baton.wire.messages import Submit
from router.admission import Served, admit
from router.ledger import Entry
from sampler.params import SamplingParams
from tests.pure.town import GREEDY, PretendTokenizer

SERVED = Served("m", "f", Limits(100, 50), (0, 7), GREEDY)


class CountingTokenizer(PretendTokenizer):
    """Remembers what it was asked to encode."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.asked.append(text)
        return super().encode(text)


def read(prompt: str | tuple[int, ...], length: int = 5, **options: Any) -> Entry:
    submit = Submit("r", prompt, GenerationParams(length, **options))
    return admit(submit, "client", SERVED, PretendTokenizer())


def test_a_prompt_becomes_ids_and_the_models_defaults_fill_in() -> None:
    entry = read("1 2 3", stop=("x",))
    assert (entry.id, entry.client, entry.prompt_ids) == ("r", "client", (1, 2, 3))
    assert entry.params == GenerationParams(5, GREEDY, ("x",), (0, 7))


def test_token_ids_are_taken_as_they_are() -> None:
    assert read((4, 5)).prompt_ids == (4, 5)


def test_eos_and_the_clients_ids_end_it_and_eos_can_be_ignored() -> None:
    assert read((4,), stop_token_ids=(7, 3)).params.stop_token_ids == (0, 7, 3)
    assert read((4,), ignore_eos=True).params.stop_token_ids == ()
    assert read((4,), ignore_eos=True, stop_token_ids=(3,)).params.stop_token_ids == (3,)


@pytest.mark.parametrize("prompt", ["", ()])
def test_nothing_is_no_prompt(prompt: str | tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        read(prompt)


def test_half_a_surrogate_pair_is_not_text() -> None:
    with pytest.raises(RequestError, match="surrogate pair at character 2"):
        read("1 \ud800")


def test_own_sampling_stands_and_tokens_of_a_stop_string_are_not_delayed() -> None:
    warm = SamplingParams(temperature=0.5)
    params = read((1,), sampling=warm, stream_interval_s=0.5).params
    assert (params.sampling, params.stream_interval_s) == (warm, 0.5)
    assert read((1,), stop=("x",), stream_interval_s=0.5).params.stream_interval_s == 0.0


def test_the_models_limits_hold() -> None:
    with pytest.raises(RequestError, match="context is 100") as caught:
        read((1,) * 99)
    assert caught.value.code == "context_length_exceeded"


def test_an_eos_counts_among_the_tokens_that_end_an_answer() -> None:
    only_eos = SamplingParams(allowed_token_ids=(0, 7))
    with pytest.raises(RequestError, match="every allowed token id ends"):
        read((1,), sampling=only_eos, min_tokens=1)
    read((1,), sampling=only_eos, min_tokens=1, ignore_eos=True)


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    tokenizer = CountingTokenizer()
    submit = Submit("r", "1 " * 1_000_000, GenerationParams(5))
    with pytest.raises(RequestError) as caught:
        admit(submit, "client", SERVED, tokenizer)
    assert caught.value.code == "context_length_exceeded"
    assert tokenizer.asked == []
