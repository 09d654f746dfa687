"""Tokenizer: text to token ids and back. TextStream: the text of one request, never half a character.

Only the router handles text, so a request's text survives the death of any worker. Needs the `tokenizers`
library only (15 MB, 0.02 s); transformers would load torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from baton.checkpoints.vocabulary import why_unread
from baton.errors import ModelError, RequestError
from baton.params import GenerationParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character, so most tokens that one character takes."""


class Tokenizer:
    """A model's tokenizer.json. Ids outside the vocabulary have no text."""

    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(why_unread(file, error)) from error
        self._partial: dict[int, bool] = {}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text has at least length / this tokens."""
        return max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    def partial(self, token_id: int) -> bool:
        """Whether the token alone is not valid text, e.g. one byte of a longer character."""
        known = self._partial.get(token_id)
        if known is None:
            known = self._partial[token_id] = REPLACEMENT in self.decode([token_id], special=True)
        return known

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of the text, with the special tokens that the tokenizer adds, if `special`."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the ids, special tokens skipped unless `special`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))


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


def check_unicode(text: str, what: str) -> None:
    """RequestError if `text`, which the message calls `what`, cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds half a surrogate pair at character {error.start}: it is not Unicode text",
            param="prompt",
        ) from error


@dataclass(frozen=True, slots=True)
class Heard:
    """Text that some ids completed, and how many of the ids were taken."""

    text: str
    tokens: int


class TextStream:
    """The growing text of one request: ids in, finished text out, up to a stop string.

    Each push decodes a few ids again, from `_anchor`, because the text of an id depends on the ids before
    it (spaces, characters of several bytes). The possible beginning of a stop string or of a character is
    held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: GenerationParams,
    ) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._unstoppable = params.min_tokens  # tokens still to come before a stop string counts
        self._ids = list(prompt_ids[-LONGEST_CHARACTER:])
        self._anchor = 0
        self._read = len(self._ids)  # ids whose text was decoded
        self._held = ""  # held back: it may begin a stop string
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

    def _push(self, ids: Sequence[int]) -> str:
        taken = self._take_whole(ids) if len(ids) > 1 else None
        if taken is None:
            taken = ""
            for each in ids:
                self._ids.append(each)
                taken += self._take(final=False)
        self._unstoppable -= len(ids)
        return self._release(taken, final=False)

    def _take_whole(self, ids: Sequence[int]) -> str | None:
        """Decode all ids at once, for half the work. None if a character is incomplete: its decoding
        depends on where the ids are split."""
        if any(self._tokenizer.partial(each) for each in ids):
            return None
        known = len(self._ids)
        self._ids += ids
        now = self._decode(self._ids[self._anchor :])
        if REPLACEMENT in now:
            del self._ids[known:]
            return None
        return self._advance(now, len(self._ids))

    def finish(self) -> str:
        """The text that was held back. An incomplete character becomes U+FFFD."""
        return self._release(self._take(final=True), final=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special=self._params.keep_special)

    def _take(self, *, final: bool) -> str:
        now = self._decode(self._ids[self._anchor :])
        end = len(self._ids)
        if now.endswith(REPLACEMENT) and not final:  # the last character may be incomplete
            if end - self._read < LONGEST_CHARACTER:
                return ""
            end = self._read + 1  # its first byte begins no character; later ones may
            now = self._decode(self._ids[self._anchor : end])
        return self._advance(now, end)

    def _advance(self, now: str, end: int) -> str:
        """The new part of `now`, the text from the anchor to `end`."""
        before = self._decode(self._ids[self._anchor : self._read])
        taken = now[len(before) :]
        if taken:  # ids without text remain context: they decide about the next word's space
            self._anchor = self._read
        self._read = end
        return taken

    def _release(self, taken: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + taken
        ends = [(at, stop) for stop in self._params.stop if (at := text.find(stop)) >= 0]
        if ends and self._unstoppable <= 0:
            self.stopped = True
            self._held = ""
            at, stop = min(ends)
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
