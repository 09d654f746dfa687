"""Scheme: how one matrix of a quantized checkpoint is stored. Plain values, no torch."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from baton.checkpoints.jsonfile import Json
from baton.checkpoints.patterns import MOST, OddPattern, compiled


class Layout(Enum):
    """Which tensors a matrix [out, in] is stored in. A word has 32 bits."""

    GPTQ = "qweight, scales, qzeros, g_idx: words hold consecutive rows of the transposed matrix"
    AWQ = "qweight, scales, qzeros: words hold columns of the transposed matrix, in an order of their own"
    PACKED = "weight_packed, weight_scale: words hold consecutive columns"
    SCALED = "weight, weight_scale: one number for each weight"
    MXFP4 = "NAME_blocks, NAME_scales: bytes hold two numbers of a stack of transposed matrices"


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of the matrix that share a scale. None: all of them."""

    rows: int | None
    columns: int | None

    def __post_init__(self) -> None:
        if any(each is not None and each < 1 for each in (self.rows, self.columns)):
            raise ValueError(f"a block has at least one row and column, got {self}")


ROW = Block(1, None)
WHOLE = Block(None, None)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one matrix is stored."""

    layout: Layout
    bits: int
    block: Block | None  # None: WHOLE or ROW, as the shape of the scales says
    is_float: bool = False
    symmetric: bool = True  # without stored zero points; GPTQ and AWQ always store them
    zeros_less_one: bool = False  # GPTQ's first format stores each zero point less 1
    reordered: bool = False  # the group of each column is told by an index, which must be there


@dataclass(frozen=True, slots=True)
class Rule:
    """The scheme of the modules whose names begin with a match. None: they are stored in full width."""

    names: re.Pattern[str]
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint says of its matrices. The first rule that matches counts, else `default`."""

    layouts: tuple[Layout, ...]
    default: Scheme | None
    rules: tuple[Rule, ...] = ()

    def scheme_of(self, module: str) -> Scheme | None:
        """Of a module, by its name. None if it has none."""
        for rule in self.rules:
            if rule.names.match(module):
                return rule.scheme
        return self.default


class Unread(Exception):
    """Why a quantization is not read, as the end of a sentence."""


def group(size: int) -> Block:
    """One row, and `size` columns: all of them where it is -1."""
    return ROW if size == -1 else Block(1, size)


def choice(found: Json, key: str, read: Collection[Any], default: Any) -> Any:
    """The value of a field, of the few that are read. Unread for another."""
    value = found.get(key)
    value = default if value is None else value
    if not any(type(value) is type(each) and value == each for each in read):
        known = " and ".join(repr(each) for each in read)
        verb = "are" if len(read) > 1 else "is"
        raise Unread(f"{key} {str(value)[:80]!r} is not read ({known} {verb})")
    return value


def group_size(found: Json, key: str = "group_size", default: int = 128) -> int:
    """Columns that share a scale; -1 for all. Unread for anything else."""
    value = found.get(key)
    value = default if value is None else value
    if type(value) is not int or not (value == -1 or 0 < value < 1 << 31):
        raise Unread(f"{key} {str(value)[:80]!r} is not read (a number of columns is, or -1)")
    return value


def pattern(text: object, where: str) -> re.Pattern[str]:
    """A regular expression of a configuration. Unread if it is none, or may take for ever."""
    if not isinstance(text, str):
        raise Unread(f"{where} has {str(text)[:80]!r}, which is no regular expression")
    try:
        return compiled(text)
    except OddPattern as why:
        raise Unread(f"{where} has {text[:80]!r}, which {why}") from why


def refuse_many(patterns: Iterable[object]) -> None:
    """Unread for more regular expressions than are tried for each name in good time."""
    if (count := sum(1 for _ in patterns)) > MOST:
        raise Unread(f"it has {count:,} regular expressions (at most {MOST:,} are read)")


def table(found: Json, key: str) -> Json:
    """A field that is an object, or missing. Unread for anything else."""
    value = found.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unread(f"{key} is not an object")
    return value


def refuse_set(found: Json, *keys: str) -> None:
    """Unread if one of these fields has a value: it would change what the numbers mean."""
    for key in keys:
        if found.get(key):
            raise Unread(f"{key} {str(found[key])[:80]!r} is not read")
