"""nanochat's tokenizer.pkl, read as data: nothing in it is imported, called or built.

The file is a pickle of one tiktoken Encoding, which spells four plain values: its name, the pattern
that cuts text into words, a rank for each token's bytes, an id for each special token. A pickle is a
program for a small stack machine. This file knows the 23 instructions that such a file consists of;
they put numbers, strings, bytes and dicts on the stack, and where the program names a class, the
name is all that is kept. Any other instruction, and any other class, refuses the file.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ModelError

ENCODING = ("tiktoken.core", "Encoding")
LARGEST_FILE = 64 << 20
LENGTH_FORMATS = {  # an instruction that is followed by a length and so many bytes
    b"C": "<B", b"B": "<I", b"\x8e": "<Q", b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q",
}  # fmt: skip
BYTES = (b"C", b"B", b"\x8e")
INTEGERS = {b"J": "<i", b"K": "<B", b"M": "<H"}
RECALL = {b"h": "<B", b"j": "<I"}


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a tiktoken Encoding consists of."""

    pattern: str
    ranks: Mapping[bytes, int]
    special: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Named:
    """What the file calls an object of this class: its name only."""

    module: str
    name: str


class _Mark:
    """Where on the stack a run of values begins."""


class _Unfit(Exception):
    """What in the file is not a plain Encoding."""


def read_encoding(path: Path) -> Encoding:
    """The Encoding in the file. ModelError for anything else, which may be code that would run."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise _Unfit(f"it is larger than {LARGEST_FILE >> 20} MiB")
        owner, state = _Reader(path.read_bytes()).read()
        return _encoding(owner, state)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except _Unfit as error:
        raise ModelError(
            f"{path} is not read: {error}; only a plain tiktoken Encoding is, and nothing in it "
            "is ever run. Give another with --tokenizer FILE; docs/checkpoints.md says how to make one"
        ) from error


def _encoding(owner: object, state: object) -> Encoding:
    if owner != _Named(*ENCODING):
        raise _Unfit("it holds no tiktoken Encoding")
    if isinstance(state, str):
        raise _Unfit(f"it names tiktoken's own {state[:40]!r} and does not hold its tokens")
    if not isinstance(state, dict):
        raise _Unfit("its Encoding has no values")
    pattern, ranks = state.get("pat_str"), state.get("mergeable_ranks")
    special = state.get("special_tokens")
    if not isinstance(pattern, str):
        raise _Unfit("its pat_str is missing")
    if not isinstance(ranks, dict) or not isinstance(special, dict):
        raise _Unfit("its tokens are missing")
    if not all(isinstance(k, bytes) and k and isinstance(v, int) for k, v in ranks.items()):
        raise _Unfit("its mergeable_ranks are not bytes with a number each")
    if not all(isinstance(k, str) and k and isinstance(v, int) for k, v in special.items()):
        raise _Unfit("its special_tokens are not texts with a number each")
    return Encoding(pattern, ranks, special)


class _Reader:
    """One pass over the instructions; `read` gives the class's name and its state."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def read(self) -> tuple[object, object]:
        state: object = None
        while (code := self._take(1)) != b".":
            if code == b"b":  # BUILD: the state of the object below it
                if state is not None:
                    raise _Unfit("it has a second object")
                state = self._pop()
            else:
                self._step(code)
        if len(self._stack) != 1 or self._at != len(self._data):
            raise _Unfit("it does not end where it should")
        return self._stack[0], state

    def _step(self, code: bytes) -> None:
        push = self._stack.append
        if code in LENGTH_FORMATS:
            found = self._take(self._number(LENGTH_FORMATS[code]))
            push(found if code in BYTES else self._text(found))
        elif code in INTEGERS:
            push(self._number(INTEGERS[code]))
        elif code in RECALL:
            place = self._number(RECALL[code])
            if place >= len(self._memo):
                raise _Unfit("it is broken")
            push(self._memo[place])
        elif code == b"\x94":  # MEMOIZE
            self._memo.append(self._top())
        elif code == b"\x80":  # PROTO
            if self._number("<B") not in (4, 5):
                raise _Unfit("it is of an old kind of pickle")
        elif code == b"\x95":  # FRAME
            self._take(8)
        elif code == b"(":
            push(_Mark())
        elif code == b"}":
            push({})
        elif code == b")":
            push(())
        elif code == b"s":
            value = self._pop()
            self._set(self._pop(), value)
        elif code == b"u":
            self._set_all()
        elif code == b"\x93":  # STACK_GLOBAL: a class, by name
            name, module = self._pop(), self._pop()
            push(_named(module, name))
        elif code == b"\x81":  # NEWOBJ: an object of a class, without arguments
            if self._pop() != () or not isinstance(self._top(), _Named):
                raise _Unfit("it asks for something to be called")
        else:
            raise _Unfit(f"it is broken, or asks for more than data (instruction {code!r})")

    def _set_all(self) -> None:
        values: list[Any] = []
        while not isinstance(value := self._pop(), _Mark):
            values.append(value)
        if len(values) % 2:
            raise _Unfit("it is broken")
        while values:
            self._set(values.pop(), values.pop())

    def _set(self, key: object, value: object) -> None:
        if not isinstance(key, str | bytes) or not isinstance(self._top(), dict):
            raise _Unfit("it is broken")
        self._top()[key] = value

    def _top(self) -> Any:
        if not self._stack:
            raise _Unfit("it is broken")
        return self._stack[-1]

    def _pop(self) -> Any:
        top = self._top()
        self._stack.pop()
        return top

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise _Unfit("it is cut short")
        self._at += size
        return found

    def _text(self, found: bytes) -> str:
        try:
            return found.decode()
        except UnicodeDecodeError:
            raise _Unfit("it is broken") from None


def _named(module: object, name: object) -> _Named:
    if (module, name) != ENCODING:
        raise _Unfit(f"it names {str(module)[:40]}.{str(name)[:40]}, which may be code that runs")
    return _Named(*ENCODING)
