"""What is told about tokens: their bytes, their places, and the drawn one among the likeliest."""

import json
from typing import Any

import pytest

from baton.params import GenerationParams
from baton.server.shapes import ChatShape, Choice, CompletionShape, Delta, Extras
from baton.text import TextStream, Tokenizer
from baton.wire.records import Logprob
from tests.pure.test_text_kinds import WITH_BYTES, made
from tests.pure.town_app import pretend_tokenizer

HEAD = {"id": "x", "created": 1, "model": "m"}
TEXTS = ["😀é a", "plain words", "日本語 😀😀", "a\n\nb", "é", ""]


def spoken(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> Choice:
    """An answer of these ids, as the router tells it."""
    stream = TextStream(tokenizer, prompt, GenerationParams(1))
    text = stream.push(ids) + stream.finish()
    chances = [Logprob(-2.0, (7, 8), (-0.5, -1.0)) for _ in ids]
    return Choice(0, tuple(prompt), text=text, token_ids=list(ids), logprobs=chances)


def whole(shape: Any, choice: Choice) -> Any:
    return json.loads(shape.whole([choice], {}))["choices"][0]


def places_in(text: str, pieces: list[bytes]) -> list[int]:
    """Where each piece's first byte lies, by the character that has it."""
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    owner = [at for at, each in enumerate(text) for _ in each.encode()]
    return [owner[start] if start < len(owner) else len(text) for start in starts]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("kind", WITH_BYTES)
def test_bytes_join_to_the_text_and_places_are_in_it(kind: str, text: str, split: int) -> None:
    """Also where the prompt ends within the answer's first character."""
    tokenizer = made(kind)
    ids = tokenizer.encode("a" + text, special=False)
    cut = len(tokenizer.encode("a", special=False)) + split
    prompt, answer = ids[:cut], ids[cut:]
    choice = spoken(tokenizer, prompt, answer)
    told = whole(ChatShape(HEAD, tokenizer, Extras(logprobs=2)), choice)
    pieces = [bytes(each["bytes"]) for each in told["logprobs"]["content"]]
    begun = choice.text.encode().removesuffix(b"".join(pieces))
    assert begun + b"".join(pieces) == choice.text.encode()
    assert len(begun) < 4
    expected = places_in(choice.text, [begun, *pieces])[1:]
    for echo in ("", "an echo"):
        choice.echo = echo
        shape = CompletionShape(HEAD, tokenizer, Extras(logprobs=2))
        assert whole(shape, choice)["logprobs"]["text_offset"] == [len(echo) + e for e in expected]
        streamed: list[int] = []
        said = Choice(0, choice.prompt_ids, echo)
        for token, chance in zip(choice.token_ids, choice.logprobs, strict=True):
            said.token_ids.append(token)
            piece = shape.piece(Delta(said, "", (token,), (chance,)))
            streamed += piece["choices"][0]["logprobs"]["text_offset"]
        assert streamed == [len(echo) + e for e in expected]


def test_what_is_not_in_the_text_has_no_bytes() -> None:
    tokenizer = pretend_tokenizer()
    (end,) = tokenizer.special_ids & {0}
    choice = spoken(tokenizer, [300], [301, end])
    told = whole(ChatShape(HEAD, tokenizer, Extras(logprobs=0, silent=frozenset({end}))), choice)
    first, last = told["logprobs"]["content"]
    assert (bytes(first["bytes"]).decode(), last["bytes"]) == (choice.text, [])
    assert last["token"]
    completion = CompletionShape(HEAD, tokenizer, Extras(logprobs=0, silent=frozenset({end})))
    assert whole(completion, choice)["logprobs"]["text_offset"] == [0, len(choice.text)]


def test_places_of_an_echo_pass_over_what_the_tokenizer_added() -> None:
    tokenizer = pretend_tokenizer()
    ids = tokenizer.encode("é a", special=False)
    choice = spoken(tokenizer, [0, *ids], [301])
    choice.echo = "é a"
    choice.scores = tuple(Logprob(-1.0, (7,), (-0.5,)) for _ in ids)
    shape = CompletionShape(HEAD, tokenizer, Extras(logprobs=1, prompt_logprobs=1))
    told = whole(shape, choice)["logprobs"]
    pieces = [tokenizer.raw_bytes(each) for each in (*ids, 301)]
    assert told["text_offset"] == [0, *places_in("é a" + choice.text, pieces)]
    assert told["top_logprobs"][0] is None
    choice.echo = tokenizer.token_text(0) + "é a"
    assert whole(shape, choice)["logprobs"]["text_offset"][1] == len(tokenizer.token_text(0))


def test_the_drawn_token_is_always_among_the_likeliest() -> None:
    tokenizer = pretend_tokenizer()
    half = tokenizer.encode("😀", special=False)
    assert len(half) > 1, "a character of several tokens"
    tops = (half[0], 300)
    for drawn in (half[1], half[0], 301):
        chance = Logprob(-3.0 if drawn != half[0] else -0.5, tops, (-0.5, -1.0))
        choice = Choice(0, (300,), token_ids=[drawn], logprobs=[chance])
        for number in (1, 2):
            few = Logprob(chance.value, tops[:number], chance.top_values[:number])
            choice.logprobs = [few]
            shape = CompletionShape(HEAD, tokenizer, Extras(logprobs=number))
            told = whole(shape, choice)["logprobs"]
            ((name,), (top,)) = told["tokens"], told["top_logprobs"]
            assert top[name] == told["token_logprobs"][0] == chance.value
            assert len(top) <= number + 1
