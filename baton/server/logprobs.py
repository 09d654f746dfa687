"""Logprobs: tokens, their bytes and places, in the two forms of OpenAI's API. Pure.

bytes    A token's own, also where it is a part of a character. Those of an answer's tokens, joined,
         are its text: what the text leaves out (special tokens, the token that ends it) has none.
places   in characters. A token that goes on with a character has the place of that character.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.text import Tokenizer
from baton.wire.records import Logprob

LEAST = -9999.0
"""OpenAI's logprob of a token that cannot be drawn. JSON has no minus infinity."""
BEFORE = 4
"""Tokens of a prompt that may hold the beginning of a character: it has at most so many bytes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How tokens are shown. `silent`: ids that are left out of the text; `as_ids`: token_id:5 for 5."""

    tokenizer: Tokenizer
    silent: frozenset[int] = frozenset()
    as_ids: bool = False

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> bytes:
        """What it adds to the text."""
        return b"" if token_id in self.silent else self.tokenizer.raw_bytes(token_id)


class Places:
    """Where tokens begin in a text, one after the other."""

    def __init__(self, at: int = 0, begun: bytes = b"") -> None:
        """`begun`: bytes before it, whose last ones may begin a character that is not whole yet."""
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(begun)
        self.at = at

    def add(self, data: bytes) -> int:
        """The place of a token with these bytes."""
        place = self.at
        self.at += len(self._decoder.decode(data))
        return place


def of_answer(vocabulary: Vocabulary, prompt: Sequence[int], at: int) -> Places:
    """For the answer to a prompt; its text begins at `at`. It may begin within a character."""
    return Places(at, b"".join(map(vocabulary.tokenizer.raw_bytes, prompt[-BEFORE:])))


def of_prompt(vocabulary: Vocabulary, ids: Sequence[int], text: str) -> list[int]:
    """The places of a prompt's tokens in its text, which lacks special tokens that encoding added."""
    tokenizer, places, found = vocabulary.tokenizer, Places(), []
    for index, each in enumerate(ids):
        data = tokenizer.raw_bytes(each)
        if each in tokenizer.special_ids and not text.startswith(
            data.decode(errors="replace"), places.at
        ):
            data = b""
        elif not index and tokenizer.token_bytes(each) is None:
            data = tokenizer.decode([each], special=True).encode()  # without a space before it
        found.append(places.add(data))
    return found


def lists(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    logprobs: Sequence[Logprob | None],
    offsets: Sequence[int],
    *,
    top: int,
) -> dict[str, Any]:
    """Of a completion. The first token of a prompt has no logprob."""
    pairs = list(zip(ids, logprobs, strict=True))
    return {
        "tokens": [vocabulary.name(each) for each in ids],
        "token_logprobs": [None if each is None else max(each.value, LEAST) for each in logprobs],
        "top_logprobs": [_tops(vocabulary, *each) for each in pairs] if top > 0 else None,
        "text_offset": list(offsets),
    }


def _tops(
    vocabulary: Vocabulary, token_id: int, logprob: Logprob | None
) -> dict[str, float] | None:
    """The likeliest, and always the token itself: one more where it is none of them."""
    if logprob is None:
        return None
    best: dict[str, float] = {}
    for each, value in zip(logprob.top_ids, logprob.top_values, strict=True):
        best.setdefault(vocabulary.name(each), max(value, LEAST))  # equal texts: the likeliest
    best[vocabulary.name(token_id)] = max(logprob.value, LEAST)
    return best


def objects(
    vocabulary: Vocabulary, ids: Sequence[int], logprobs: Sequence[Logprob]
) -> dict[str, Any]:
    """Of a chat: one object a token."""
    content = []
    for token_id, logprob in zip(ids, logprobs, strict=True):
        top = zip(logprob.top_ids, logprob.top_values, strict=True)
        content.append(
            _scored(vocabulary, token_id, logprob.value)
            | {"top_logprobs": [_scored(vocabulary, each, value) for each, value in top]}
        )
    return {"content": content, "refusal": None}


def _scored(vocabulary: Vocabulary, token_id: int, value: float) -> dict[str, Any]:
    return {
        "token": vocabulary.name(token_id),
        "logprob": max(value, LEAST),
        "bytes": list(vocabulary.bytes(token_id)),
    }
