"""From what a client sent to a request, or to a refusal in words."""

import pytest

from baton.errors import RequestError
from baton.request import Limits, Request
from baton.wire.messages import Submit
from router.intake import Served, read_submit
from tests.pure.town import GREEDY, PretendTokenizer

SERVED = Served("m", "f", Limits(100, 50), (0, 7), GREEDY)


class CountingTokenizer(PretendTokenizer):
    """Remembers what it was asked to encode."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.asked.append(text)
        return super().encode(text)


def read(submit: Submit) -> Request:
    return read_submit(submit, "client", SERVED, PretendTokenizer())


def test_a_prompt_becomes_ids_and_the_models_defaults_fill_in() -> None:
    request = read(Submit("r", "1 2 3", None, 5, stop=("x",)))
    assert request == Request("r", "client", (1, 2, 3), 5, GREEDY, ("x",), (0, 7))


def test_token_ids_are_taken_as_they_are() -> None:
    assert read(Submit("r", None, (4, 5), 5)).prompt_ids == (4, 5)


def test_eos_can_be_ignored() -> None:
    assert read(Submit("r", None, (4,), 5, ignore_eos=True)).stop_ids == ()


@pytest.mark.parametrize(("prompt", "ids"), [("1", (1,)), (None, None)])
def test_a_prompt_comes_as_text_or_as_ids(prompt: str | None, ids: tuple[int, ...] | None) -> None:
    with pytest.raises(RequestError, match="either a prompt or token ids"):
        read(Submit("r", prompt, ids, 5))


@pytest.mark.parametrize(("prompt", "ids"), [("", None), (None, ())])
def test_nothing_is_no_prompt(prompt: str | None, ids: tuple[int, ...] | None) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        read(Submit("r", prompt, ids, 5))


def test_half_a_surrogate_pair_is_not_text() -> None:
    with pytest.raises(RequestError, match="surrogate pair at character 2"):
        read(Submit("r", "1 \ud800", None, 5))


def test_sampling_is_checked_and_completed() -> None:
    assert read(Submit("r", None, (1,), 5, {"temperature": 0.0})).sampling == GREEDY
    with pytest.raises(RequestError, match="top_p"):
        read(Submit("r", None, (1,), 5, {"top_p": 0.0}))


def test_the_models_limits_hold() -> None:
    with pytest.raises(RequestError, match="context is 100") as caught:
        read(Submit("r", None, (1,) * 99, 5))
    assert caught.value.code == "context_length_exceeded"


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    tokenizer = CountingTokenizer()
    with pytest.raises(RequestError) as caught:
        read_submit(Submit("r", "1 " * 1_000_000, None, 5), "client", SERVED, tokenizer)
    assert caught.value.code == "context_length_exceeded"
    assert tokenizer.asked == []
