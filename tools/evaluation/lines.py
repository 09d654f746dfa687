"""Lines: JSON files with an object on each line, whose mistakes are named with file and line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import InputError


@dataclass(frozen=True, slots=True)
class Line:
    """One object, and where it stands."""

    place: str  # FILE:LINE
    fields: Mapping[str, Any]

    def wrong(self, what: str) -> InputError:
        """To be raised."""
        return InputError(f"{self.place}: {what}")

    def text(self, name: str) -> str:
        """A field that must be there and be a text; a number is taken as it is written."""
        return self._text(name, self._field(name))

    def texts(self, name: str, *, least: int = 1) -> tuple[str, ...]:
        """A field that must be a list of texts."""
        found = self._field(name)
        if not isinstance(found, list) or len(found) < least:
            raise self.wrong(f"{name} must be a list of {least} or more texts, got {_short(found)}")
        return tuple(self._text(f"{name}[{i}]", each) for i, each in enumerate(found))

    def index(self, name: str, size: int) -> int:
        """A field that must be a number from 0 to size - 1."""
        found = self._field(name)
        if type(found) is not int or not 0 <= found < size:
            raise self.wrong(f"{name} must be a number from 0 to {size - 1}, got {_short(found)}")
        return found

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise self.wrong(f"there is no {name!r}; it has {', '.join(map(repr, self.fields))}")
        return self.fields[name]

    def _text(self, name: str, found: object) -> str:
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            raise self.wrong(f"{name} must be a text, got {_short(found)}")
        text = str(found)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.wrong(f"{name} holds half a surrogate pair")
        return text


def read_lines(file: Path) -> Iterator[Line]:
    """The objects of a file; empty lines are none. Raises InputError."""
    for number, text in enumerate(read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        place = f"{file}:{number}"
        try:
            found = json.loads(text)
        except ValueError as error:
            raise InputError(f"{place}: this is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{place}: an object is needed, got {_short(found)}")
        yield Line(place, found)


def read_text(file: Path) -> str:
    """All of it, ends of lines as they are. Raises InputError."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
