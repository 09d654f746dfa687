"""nanochat's tokenizer.pkl, read as data: nothing in it is imported, called or constructed.

The file is a pickle of one tiktoken Encoding, which has four plain values: its name, the pattern that
splits text into words, a rank for the bytes of each token, an id for each special token. A pickle is a
program for a small stack machine. Python's pickletools decodes its instructions without executing
them. The machine here executes the few that make numbers, strings, bytes and dicts. Of a class it keeps
the name only. Any other instruction, and any other class, is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickletools import genops
from typing import Any

from baton.checkpoints.jsonfile import reason
from baton.errors import ModelError

ENCODING = ("tiktoken.core", "Encoding")
LARGEST_FILE = 64 << 20
VALUES = {
    *("BININT", "BININT1", "BININT2", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """The values of a tiktoken Encoding."""

    pattern: str
    ranks: Mapping[bytes, int]
    special: Mapping[str, int]


class _Mark:
    """Marks where a run of values begins on the stack."""


class _Class:
    """Stands for tiktoken's Encoding, and for the one object of it."""


class _Unfit(Exception):
    """Why the file is not a plain Encoding."""


def read_encoding(path: Path) -> Encoding:
    """The Encoding in the file. Raises ModelError for anything else, because a pickle may run code."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise _Unfit(f"it is larger than {LARGEST_FILE >> 20} MiB")
        return _encoding(*_Machine().run(path.read_bytes()))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}") from error
    except _Unfit as error:
        raise ModelError(
            f"{path} is not read: {error}; it must be a plain tiktoken Encoding, and nothing in it "
            "is ever run. Give another with --tokenizer FILE; docs/checkpoints.md says how to make one"
        ) from error


def _encoding(owner: object, state: object) -> Encoding:
    if not isinstance(owner, _Class):
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
    for name, table, kind in (
        ("mergeable_ranks", ranks, bytes),
        ("special_tokens", special, str),
    ):
        if not all(isinstance(k, kind) and k and isinstance(v, int) for k, v in table.items()):
            raise _Unfit(f"its {name} must map {kind.__name__} to numbers")
    return Encoding(pattern, ranks, special)


class _Machine:
    """Runs one file."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._state: object = None

    def run(self, data: bytes) -> tuple[object, object]:
        """The object that the program leaves on the stack, and the object's state."""
        file = BytesIO(data)
        try:
            for opcode, argument, _ in genops(file):
                self._step(opcode.name, argument)
        except UnicodeError:
            raise _Unfit("it is broken") from None
        except ValueError:
            raise _Unfit("it is cut short or broken") from None
        if len(self._stack) != 1 or file.read(1):
            raise _Unfit("it does not end where it should")
        return self._stack[0], self._state

    def _step(self, name: str, argument: Any) -> None:
        push = self._stack.append
        match name:
            case "FRAME" | "STOP":
                pass
            case "PROTO" if argument in (4, 5):
                pass
            case "PROTO":
                raise _Unfit("its pickle protocol is not 4 or 5")
            case _ if name in VALUES:
                if isinstance(argument, str):
                    argument.encode()  # half a surrogate pair: UnicodeError
                push(argument)
            case "BINGET" | "LONG_BINGET":
                if argument >= len(self._memo):
                    raise _Unfit("it is broken")
                push(self._memo[argument])
            case "MEMOIZE":
                self._memo.append(self._top())
            case "MARK":
                push(_Mark())
            case "EMPTY_DICT":
                push({})
            case "EMPTY_TUPLE":
                push(())
            case "SETITEM":
                value = self._pop()
                self._set(self._pop(), value)
            case "SETITEMS":
                self._set_all()
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                if (module, attribute) != ENCODING:
                    named = f"{str(module)[:40]}.{str(attribute)[:40]}"
                    raise _Unfit(f"it names {named}, which may be code that runs")
                push(_Class())
            case "NEWOBJ":
                if self._pop() != () or not isinstance(self._top(), _Class):
                    raise _Unfit("it calls a function")
            case "BUILD" if self._state is None:
                self._state = self._pop()
            case "BUILD":
                raise _Unfit("it has a second object")
            case _:
                raise _Unfit(f"it contains more than data (instruction {name})")

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
