"""Texts: the text of a server that knows no token ids, as ids of --model. Pure.

Prompts go out as the text of their ids. What comes back is cut into words, and each word is tokenized by
itself:

    - Words depend on the text alone, and not on the parts in which it came: an answer that is
      generated again gives the same ids, so that the known ones can be dropped (answer.py).
    - The last word is held back until more comes, or the end, because more might belong to it.

The ids are not always those that the server drew. Their text is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from baton.errors import RequestError
from baton.text import Tokenizer

LONGEST_WORD = 32
"""Characters: text without spaces streams in pieces of this length."""
WIDE = "\u2e80"
"""From here on (Chinese, Japanese, Korean, emoji) a character is a word."""
BEFORE = ("\n", "a", "")
"""What a word is tokenized after, as it stands inside of a text: the first that leaves it as it is."""
KEPT_WORDS = 4096


class Untellable(ValueError):
    """A text that no ids of this model have."""


def words(text: str) -> list[str]:
    """The text in pieces. One begins with each space after something else, after a wide character, and
    after LONGEST_WORD characters."""
    found: list[str] = []
    start = 0
    for index in range(1, len(text)):
        before, here = text[index - 1], text[index]
        begins = here.isspace() and not before.isspace()
        if begins or before >= WIDE or here >= WIDE or index - start >= LONGEST_WORD:
            found.append(text[start:index])
            start = index
    return [*found, text[start:]] if text else []


@dataclass(frozen=True)
class Texts:
    """Ids to text and back. `adds`: the server puts the tokenizer's special tokens before a prompt."""

    tokenizer: Tokenizer
    adds: bool = True
    _ids_of: Callable[[str], tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids_of", lru_cache(KEPT_WORDS)(self._ids_of_word))

    @property
    def first(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        plain = self.tokenizer.encode("a", special=False)
        whole = self.tokenizer.encode("a")
        return whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else []

    def prompt(self, ids: Sequence[int], generated: int = 0) -> str:
        """The text to send for these ids, of which the last so many were generated. Raises
        RequestError if the server would see other ids than those of the prompt."""
        first = self.first if self.adds else []
        given = list(ids[: len(ids) - generated])
        begins = given[: len(first)] == first
        text = self.tokenizer.decode(given[len(first) :], special=True) if begins else ""
        if not text or self.tokenizer.encode(text, special=self.adds) != given:
            raise RequestError(
                "the engine behind this cluster takes text alone, and these token ids are not those of a "
                "text: send the prompt as text, with the model's special tokens at its beginning"
            )
        return self.tokenizer.decode(list(ids[len(first) :]), special=True)

    def ids(self, word: str) -> tuple[int, ...]:
        """Those of a word inside of a text. Raises Untellable."""
        return self._ids_of(word)

    def _ids_of_word(self, word: str) -> tuple[int, ...]:
        for before in BEFORE:
            known = self.tokenizer.encode(before, special=False) if before else []
            ids = self.tokenizer.encode(before + word, special=False)
            if ids[: len(known)] == known and self._says(known, ids, word):
                return tuple(ids[len(known) :])
        if len(word) > 1:
            return tuple(token for character in word for token in self.ids(character))
        raise Untellable(f"no tokens of --model make the text {word!r}")

    def _says(self, known: list[int], ids: list[int], word: str) -> bool:
        shown = self.tokenizer.decode(known, special=True)
        return self.tokenizer.decode(ids, special=True) == shown + word

    def lossless(self, text: str) -> bool:
        """Whether ids can say this text."""
        try:
            ids = [token for word in words(text) for token in self.ids(word)]
        except Untellable:
            return False
        return self.tokenizer.decode(ids, special=True).strip() == text.strip()


@dataclass(slots=True)
class Reader:
    """Ids out of one answer's text."""

    texts: Texts
    _rest: str = ""

    def feed(self, more: str, *, ends: bool) -> list[int]:
        """The ids that are certain now; all of them if the answer `ends`. Raises Untellable."""
        found = words(self._rest + more)
        self._rest = found.pop() if found and not ends else ""
        return [token for word in found for token in self.texts.ids(word)]
