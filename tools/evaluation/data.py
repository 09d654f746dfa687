"""Data: JSON lines with precise error messages, prompts with references, and the bundled documents.

    {"prompt": "...", "reference": "..."}        or {"prompt": "...", "references": ["...", "..."]}

Without a file, the bundled model is evaluated on documents it was not trained on. No torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from baton.errors import InputError
from tools.training.demo_corpus import documents

HELD_OUT = "held-out"
SEED = 0
TEXTS = 500  # as baton/models/demo/README.md measures
PAIRS = 100
BUNDLE = Path(__file__).parent / "bundle"
BUNDLED_MODEL = "demo"


@dataclass(frozen=True, slots=True)
class Line:
    """One object of a file."""

    place: str  # FILE:LINE
    fields: Mapping[str, Any]

    def wrong(self, what: str) -> InputError:
        """The error to raise for a mistake in this line."""
        return InputError(f"{self.place}: {what}")

    def text(self, name: str) -> str:
        """A required text field. A number is taken as it is written."""
        return self._text(name, self._field(name))

    def texts(self, name: str, *, least: int = 1) -> tuple[str, ...]:
        """A required list of `least` or more texts."""
        found = self._field(name)
        if not isinstance(found, list) or len(found) < least:
            raise self.wrong(f"{name} must be a list of {least} or more texts, got {_short(found)}")
        return tuple(self._text(f"{name}[{i}]", each) for i, each in enumerate(found))

    def index(self, name: str, size: int) -> int:
        """A required number from 0 to size - 1."""
        found = self._field(name)
        if type(found) is not int or not 0 <= found < size:
            raise self.wrong(f"{name} must be a number from 0 to {size - 1}, got {_short(found)}")
        return found

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise self.wrong(
                f"missing field {name!r}; there are {', '.join(map(repr, self.fields))}"
            )
        return self.fields[name]

    def _text(self, name: str, found: object) -> str:
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            raise self.wrong(f"{name} must be a text, got {_short(found)}")
        text = str(found)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.wrong(f"{name} holds half a surrogate pair")
        return text


def read_lines(file: Path) -> Iterator[Line]:
    """The objects of a JSON lines file, without empty lines. Raises InputError."""
    for number, text in enumerate(read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        place = f"{file}:{number}"
        try:
            found = json.loads(text)
        except ValueError as error:
            raise InputError(f"{place}: not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{place}: an object is needed, got {_short(found)}")
        yield Line(place, found)


def read_text(file: Path) -> str:
    """The whole file as UTF-8, line ends unchanged. Raises InputError."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its references."""

    prompt: str
    references: tuple[str, ...]


def read_pairs(file: Path) -> list[Pair]:
    """The pairs of a JSON lines file. Raises InputError."""
    pairs = []
    for line in read_lines(file):
        if ("reference" in line.fields) == ("references" in line.fields):
            raise line.wrong("either 'reference' or 'references' is needed")
        if "reference" in line.fields:
            references: tuple[str, ...] = (line.text("reference"),)
        else:
            references = line.texts("references")
        if not all(each.strip() for each in references):
            raise line.wrong("a reference is empty")
        pairs.append(Pair(line.text("prompt"), references))
    if not pairs:
        raise InputError(f"{file} has no lines")
    return pairs


def held_out_texts() -> list[str]:
    """Held-out documents. Each is to be closed by the model's end token."""
    return list(islice(documents(split=HELD_OUT, seed=SEED), TEXTS))


def held_out_pairs() -> list[Pair]:
    """Held-out documents cut in the middle between two words."""
    return [_halves(text) for text in islice(documents(split=HELD_OUT, seed=SEED), PAIRS)]


def _halves(text: str) -> Pair:
    words = text.split(" ")
    middle = len(words) // 2
    return Pair(" ".join(words[:middle]), (" ".join(words[middle:]),))
