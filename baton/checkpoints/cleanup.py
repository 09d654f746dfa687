"""Clean-up: the spaces that transformers takes out of decoded text if tokenizer_config.json says so.

`clean_up_tokenization_spaces` was made for WordPiece, whose tokens have no spaces of their own. For BPE
it would take meant spaces away: transformers 5 ignores it there, unless a second setting insists.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

SETTING = "clean_up_tokenization_spaces"
ALSO_FOR_BPE = f"{SETTING}_for_bpe_even_though_it_will_corrupt_output"
LOOSE = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""From these the spaces are taken out, in transformers' order."""
UNDECIDED = re.compile(r" [ 'nvr]*\Z")
"""Each of them begins with a space and goes on with these characters up to its last one. Only spaces are
taken out, so a text may be cut behind any other character: both parts are cleaned as the whole is."""
LONGEST = max(map(len, LOOSE))


def cleans_up(settings: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Does transformers clean up what this tokenizer decodes? `settings`: of tokenizer_config.json."""
    is_bpe = type(tokenizer.model).__name__ == "BPE"
    return bool(settings.get(SETTING)) and (not is_bpe or bool(settings.get(ALSO_FOR_BPE)))


def clean(text: str) -> str:
    """A decoded text without these spaces."""
    for loose in LOOSE:
        text = text.replace(loose, loose.strip())
    return text


class CleanedText:
    """Text that grows, cleaned as the whole of it would be. What more text may change is held back."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str, *, final: bool = False) -> str:
        """The clean text that is decided now."""
        text = self._held + text
        end = len(text) if final else decided(text)
        self._held = text[end:]
        return clean(text[:end])


def decided(text: str) -> int:
    """Characters at the beginning that are cleaned in the same way whatever follows."""
    found = UNDECIDED.search(text)
    is_near = " " in text[1 - LONGEST :]  # else nothing that is replaced reaches beyond the end
    return found.start() if found and is_near else len(text)
