"""Tokenizer: text to token ids and back. TextStream: the text of one request, never half a character.

Only the router handles text, so a request's text survives the death of any worker. Needs the `tokenizers`
library only (15 MB, 0.02 s); transformers would load torch.

The text of an id depends on the ids before it, in two ways:

    spaces        "▁two" is "two" at the beginning of a text and " two" elsewhere; "##ing" goes on
                  with a word. So new ids are decoded together with some before them, the *context*.
    characters    Several ids may make one character. A byte-level tokenizer decodes half of one to
                  one U+FFFD; one with byte fallback decodes a whole run of bytes to U+FFFD if one is
                  missing. So a context begins with a character, and half of one is held back.

Some tokenizers are cleaned up: a space before a full stop, or within "do n't", is taken out afterwards. A
space that may go is held back, too. One at the end of a prompt stays: its text is known.
"""

import json
import re
from codecs import utf_8_decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from baton.checkpoints.added_tokens import read_vocabulary
from baton.checkpoints.cleanup import CleanedText, clean
from baton.checkpoints.tokenizer_json import byte_letters
from baton.errors import RequestError
from baton.params import GenerationParams, check_unicode

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character."""
CONTEXTS = (8, 64, 512, 4096)
"""Ids at the end of a prompt, among which a context is looked for: as few as show text. A prompt that
shows none in the last of them is garbage, and so may be the first space of its answer."""
FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
SAMPLE = "a"
"""A text to put before a token."""


class Bytes(Enum):
    """Which tokens of a vocabulary are bytes rather than text."""

    NONE = auto()
    ALL = auto()  # byte-level: each token is some bytes, a character may end anywhere in it
    FALLBACK = auto()  # "<0xE6>" is one byte; all others are text


class Tokenizer:
    """A model's tokenizer.json, with the tokens beside it. Ids outside the vocabulary have no text."""

    def __init__(self, file: Path) -> None:
        """Raises ModelError."""
        vocabulary = read_vocabulary(file)
        self.end_id = vocabulary.end_id
        self.cleans_up = vocabulary.cleans_up
        self._tokenizer = vocabulary.tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._kind = kind_of_bytes(self._tokenizer)
        self.falls_back = self._kind is Bytes.FALLBACK
        self._bytes: dict[int, bytes | None] = {}
        self._texts: dict[int, str] = {}

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text has at least length / this tokens."""
        return max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of the text, with the special tokens that the tokenizer adds, if `special`."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the ids, special tokens skipped unless `special`."""
        return self._clean(self.decode_loose(ids, special=special))

    def decode_whole(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the ids up to the last whole character: without one that further ids may complete."""
        return self._clean(self.decode_whole_loose(ids, special=special))

    # ---- parts of a text

    def decode_loose(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The same as decode(), not cleaned up."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def decode_whole_loose(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The same as decode_whole(), not cleaned up."""
        if self.falls_back:
            shown = self.shown(ids, special=special)
            whole = shown[: len(shown) - self._unfinished(shown)]
            return self.decode_loose(whole, special=special)
        text = self.decode_loose(ids, special=special)
        if text.endswith(REPLACEMENT) and self._unfinished(self.shown(ids, special=special)):
            return text[:-1]
        return text

    def _clean(self, text: str) -> str:
        return clean(text) if self.cleans_up else text

    def token_text(self, token_id: int) -> str:
        """Text of one token inside of a text, with the space before it. Half a character is U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            before = self.decode(self._sample)
            both = self.decode([*self._sample, token_id], special=True)
            alone = self.decode([token_id], special=True)
            text = both[len(before) :] if both.startswith(before) else alone
            self._texts[token_id] = text
        return text

    def token(self, token_id: int) -> str:
        """The token as the vocabulary has it; empty outside of it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def shown(self, ids: Sequence[int], *, special: bool = False) -> list[int]:
        """The ids that decode() does not leave out."""
        known = self._tokenizer.id_to_token
        skipped = () if special else self.special_ids
        return [each for each in ids if each not in skipped and known(each) is not None]

    def byte(self, token_id: int) -> int | None:
        """The byte that the token falls back to; None if it is not such a token."""
        found = self.token_bytes(token_id) if self.falls_back else None
        return found[0] if found else None

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that need not be whole characters; None for tokens that are text."""
        if token_id not in self._bytes:
            token = self._tokenizer.id_to_token(token_id)
            self._bytes[token_id] = None if token is None else bytes_of(token, self._kind)
        return self._bytes[token_id]

    def raw_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text that it stands in."""
        found = self.token_bytes(token_id)
        return self.token_text(token_id).encode() if found is None else found

    def _unfinished(self, ids: Sequence[int]) -> int:
        """Bytes at the end that begin a character and do not end it."""
        tail = b""
        for each in reversed(ids):
            found = self.token_bytes(each)
            if found is None or len(tail) >= LONGEST_CHARACTER:
                break
            tail = found + tail
        return unfinished(tail)

    @cached_property
    def _sample(self) -> list[int]:
        return self.shown(self.encode(SAMPLE, special=False))


def kind_of_bytes(tokenizer: FastTokenizer) -> Bytes:
    """Read off the tokenizer's decoder."""
    decoder = tokenizer.decoder
    kinds = set(_kinds(json.loads(decoder.__getstate__()))) if decoder is not None else set()
    if "ByteFallback" in kinds:
        return Bytes.FALLBACK
    return Bytes.ALL if "ByteLevel" in kinds else Bytes.NONE


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield str(decoder.get("type"))
    for each in decoder.get("decoders", ()):
        yield from _kinds(each)


def bytes_of(token: str, kind: Bytes) -> bytes | None:
    """The bytes that stand for a token, as the library's decoders see it; None if it is text."""
    if kind is Bytes.FALLBACK:
        found = FALLBACK.fullmatch(token)
        return bytes([int(found[1], 16)]) if found else None
    if kind is Bytes.NONE:
        return None
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


BYTE_OF = {letter: byte for byte, letter in byte_letters().items()}


def unfinished(tail: bytes) -> int:
    """How many bytes at the end begin a character that is not whole yet: 0 to 3."""
    for length in range(1, min(len(tail), LONGEST_CHARACTER - 1) + 1):
        if whole_bytes(tail[-length:]) == 0:
            return length
    return 0


def whole_bytes(begin: bytes) -> int | None:
    """Bytes of the whole characters at the beginning: 0 if more bytes may make them one, None if no bytes
    can."""
    try:
        return utf_8_decode(begin, "strict", False)[1]
    except UnicodeDecodeError as error:
        return error.start or None


def chat_ends(
    tokenizer: Tokenizer, eos_token_ids: Sequence[int], vocabulary: int
) -> tuple[int, ...]:
    """The ids that end a chat beside those that end any text of the model, `eos_token_ids`: the
    tokenizer's own end. Models that were made for text before they were made to chat have two."""
    own = tokenizer.end_id
    known = own is None or own in eos_token_ids or own >= vocabulary
    return () if own is None or known else (own,)


def encode_prompt(
    tokenizer: Tokenizer, text: str, context: int, *, special: bool = True
) -> tuple[int, ...]:
    """Token ids of a prompt. Raises RequestError for text that has more than `context` tokens in any
    case, before it is tokenized, and for text that is not Unicode."""
    fewest = len(text) // tokenizer.longest_token
    if fewest > context:
        raise RequestError(
            f"the prompt has {len(text):,} characters, at least {fewest:,} tokens, but the "
            f"context is {context:,}; shorten it",
            code="context_length_exceeded",
            param="max_tokens",
        )
    check_unicode(text, "the prompt")
    return tuple(tokenizer.encode(text, special=special))


@dataclass(frozen=True, slots=True)
class Heard:
    """Text that some ids completed, and how many of the ids were taken."""

    text: str
    tokens: int


class Characters:
    """Sorts ids into whole characters for a tokenizer that falls back to bytes; others decode any ids."""

    __slots__ = ("_begun", "_bytes", "_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, special: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._begun: list[int] = []  # ids of bytes that begin a character
        self._bytes = b""

    @property
    def begun(self) -> int:
        """Bytes of a character that is not whole yet."""
        return len(self._begun)

    def add(self, ids: Sequence[int]) -> list[int | None]:
        """The ids that are whole with these, in their order; None for a byte that is no character."""
        if not self._tokenizer.falls_back:
            return list(ids)
        shown = self._tokenizer.shown(ids, special=self._special)
        return [found for each in shown for found in self._add(each)]

    def _add(self, token_id: int) -> list[int | None]:
        byte = self._tokenizer.byte(token_id)
        if byte is None:
            broken: list[int | None] = [None] * self.begun
            self._begun, self._bytes = [], b""
            return [*broken, token_id]
        self._begun.append(token_id)
        self._bytes += bytes([byte])
        broken = []
        while (whole := whole_bytes(self._bytes)) is None:
            broken.append(None)
            self._begun, self._bytes = self._begun[1:], self._bytes[1:]
        if not whole:
            return broken
        found, self._begun, self._bytes = self._begun, [], b""
        return [*broken, *found]


class TextStream:
    """The growing text of one request: ids in, finished text out, up to a stop string.

    The text of the prompt and all that is pushed is the text of all ids together. A character that the
    prompt begins and does not end belongs to the answer. Held back are the beginning of a character, a
    space that may be cleaned up, and what may begin a stop string.
    """

    __slots__ = (
        "_characters", "_cleaned", "_context", "_held", "_hidden", "_new", "_params", "_special",
        "_tokenizer", "_unstoppable", "stop", "stopped",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: GenerationParams,
    ) -> None:
        self._tokenizer = tokenizer
        self._params = params
        shown = frozenset(params.shown_special)
        self._hidden = tokenizer.special_ids - shown if shown else frozenset[int]()
        self._special = params.keep_special or bool(shown)
        self._unstoppable = params.min_tokens  # tokens still to come before a stop string counts
        self._new: list[int] = []  # ids of whole characters, not yet decoded
        for length in CONTEXTS:
            self._characters = Characters(tokenizer, special=self._special)
            found = self._characters.add(self._visible(prompt_ids[-length:]))
            self._context = [each for each in found if each is not None]  # their text is known
            if length >= len(prompt_ids) or self._decode(self._context).strip():
                break
        self._cleaned = CleanedText() if tokenizer.cleans_up else None
        self._held = ""  # held back: it may begin a stop string
        self.stop = ""  # the stop string that was found
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; empty once `stopped`."""
        return self.take(ids).text

    def take(self, ids: Sequence[int]) -> Heard:
        """The same, and how many ids were taken: none after the end of a stop string."""
        if not self._params.stop:
            return Heard(self._push(ids), len(ids))
        text = ""
        for count, each in enumerate(ids, start=1):
            text += self._push([each])
            if self.stopped:
                return Heard(text, count)
        return Heard(text, len(ids))

    def finish(self) -> str:
        """The text that was held back. A character that is not whole becomes U+FFFD."""
        taken = self._decode(self._context)[len(self._decode_whole(self._context)) :]
        return self._release(taken + REPLACEMENT * self._characters.begun, final=True)

    def _push(self, ids: Sequence[int]) -> str:
        taken = ""
        for each in self._characters.add(self._visible(ids)):
            if each is None:
                taken += self._completed() + REPLACEMENT
            else:
                self._new.append(each)
        taken += self._completed()
        if not self._params.stop and self._cleaned is None:
            return taken
        self._unstoppable -= len(ids)
        return self._release(taken, final=False)

    def _completed(self) -> str:
        """The text of the new ids, which become context."""
        if not self._new:
            return ""
        known = self._decode_whole(self._context)
        taken = self._decode_whole(self._context + self._new)[len(known) :]
        # ids without text leave the context as it is: it decides about the next word's space
        self._context = self._new if taken else self._context + self._new
        self._new = []
        return taken

    def _visible(self, ids: Sequence[int]) -> Sequence[int]:
        """Without special tokens that are hidden although others are shown."""
        if not self._hidden or self._params.keep_special:
            return ids
        return [each for each in ids if each not in self._hidden]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode_loose(ids, special=self._special)

    def _decode_whole(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode_whole_loose(ids, special=self._special)

    def _release(self, taken: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        if self._cleaned is not None:
            taken = self._cleaned.add(taken, final=final)
        text = self._held + taken
        ends = [(at, stop) for stop in self._params.stop if (at := text.find(stop)) >= 0]
        if ends and self._unstoppable <= 0:
            self.stopped = True
            self._held = ""
            at, stop = min(ends)
            self.stop = stop
            return text[: at + len(stop) if self._params.include_stop else at]
        if self._unstoppable > 0:  # stop strings do not begin before min_tokens
            self._held = ""
            return text
        keep = 0 if final else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest suffix of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._params.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._params.stop):
                return length
        return 0
