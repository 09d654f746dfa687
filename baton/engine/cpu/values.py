"""The intermediate form of a program: values, and the work that computes them.

A Value is one row of a traced tensor: of [1, T, heads, D], each of the T rows has the numbers
[1, heads, D], somewhere in a run of floats (a Base). Views, transposes and slices change offsets and
strides only, at no cost; arithmetic makes a new Base.

The work is grouped into levels: row operations, matrix products and attention. A barrier separates
each level from the next.
"""

import itertools
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod

import torch

from baton.engine.cpu.capture import LOGIT_ROWS, TOKENS
from baton.engine.errors import CompileError

Constant = torch.Tensor


class Space(IntEnum):
    """What a row of a value belongs to."""

    TOKENS = 0
    LOGIT_ROWS = 1  # the tokens that need logits


@dataclass(eq=False, slots=True)
class Base:
    """A run of `width` floats per row, written once. `level` orders the stages: row work has even
    levels, matrix products and attention have odd ones."""

    space: Space
    width: int
    level: int
    parent: "Base | None" = None  # the larger run that contains this one, at `offset`
    offset: int = 0
    last_use: int = -1  # the last level that reads it
    kind: str = "arena"  # or ids, positions, logits

    def root(self) -> tuple["Base", int]:
        """The outermost base that contains this one, and the offset in it."""
        if self.parent is None:
            return self, 0
        base, offset = self.parent.root()
        return base, offset + self.offset


@dataclass(frozen=True, slots=True)
class Value:
    """One row of a tensor. `shape` and `strides` leave out the row dimension, which is at `axis`."""

    base: Base
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    axis: int

    @property
    def contiguous(self) -> bool:
        """Whether its numbers are adjacent and in order."""
        wanted = dense(self.shape)
        return all(
            size == 1 or stride == want
            for size, stride, want in zip(self.shape, self.strides, wanted, strict=True)
        )

    @property
    def size(self) -> int:
        """Numbers in one row."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Complex:
    """The two parts of complex numbers."""

    real: Value
    imaginary: Value


@dataclass(frozen=True, slots=True)
class At:
    """An operand of a micro-operation (Operand of rows.h): where it is read or written."""

    where: Base | Constant
    offset: int
    outer_stride: int
    inner_stride: int
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class Micro:
    """One row-local operation over two nested loops (Op of rows.h)."""

    code: str
    outer: int
    inner: int
    to: At
    a: At
    b: At | None = None
    c: At | None = None
    x: float = 0.0
    y: float = 0.0


@dataclass(eq=False, slots=True)
class Product:
    """A matrix product: rows [T, K] @ a constant [K, N], plus a bias [N]."""

    rows: Value
    weight: Constant
    bias: Constant | None
    to: Base
    exact: bool = False  # its weight is never quantized (routers.py)


@dataclass(eq=False, slots=True)
class Grouped:
    """A product whose weight each row chooses: row r, slot s is rows [T, K] or [T, slots, K] times the
    constant [N, K] of [experts, N, K] that `chosen` [T, slots] names, plus its bias of [experts, N]."""

    rows: Value
    chosen: Value
    weight: Constant
    bias: Constant | None
    to: Base  # [T, slots, N]


@dataclass(eq=False, slots=True)
class Attend:
    """One layer's attention: write key and value into the pool, then attend over it."""

    layer: int
    query: Value
    key: Value
    value: Value
    to: Base


@dataclass(slots=True)
class Level:
    """The work between two barriers."""

    rows: dict[Space, list[Micro]] = field(default_factory=lambda: {space: [] for space in Space})
    products: list[Product] = field(default_factory=list)
    grouped: list[Grouped] = field(default_factory=list)
    attends: list[Attend] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered forward: levels in order, and the value that holds the logits."""

    levels: tuple[Level, ...]
    logits: Value


def new_value(space: Space, shape: tuple[int, ...], axis: int, level: int) -> Value:
    """A contiguous value on a base of its own, computed at `level`."""
    return Value(Base(space, prod(shape), level), 0, shape, dense(shape), axis)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)] if shape else ()


def split_rows(shape: tuple[int, ...]) -> tuple[Space, int, tuple[int, ...]]:
    """A traced tensor's row space, the axis of its rows, and its shape without that axis. CompileError
    if it has no row dimension or several."""
    axes = [i for i, size in enumerate(shape) if size in (TOKENS, LOGIT_ROWS)]
    if len(axes) != 1 or any(size > TOKENS and size % TOKENS == 0 for size in shape):
        raise CompileError(f"it combines tokens outside attention: a tensor of {list(shape)}")
    axis = axes[0]
    space = Space.TOKENS if shape[axis] == TOKENS else Space.LOGIT_ROWS
    return space, axis, shape[:axis] + shape[axis + 1 :]


def reshaped(
    value: Value, before: tuple[int, ...], shape: tuple[int, ...], axis: int
) -> Value | None:
    """The same numbers in another shape; None if they would have to be copied first. `before`: the
    dimensions that were in front of the row axis; `axis`: where that axis is now. CompileError if
    the reshape moves numbers between rows."""
    if prod(before) != prod(shape[:axis]):
        raise CompileError("a reshape mixes the numbers of several tokens")
    strides = _restride(value.shape, value.strides, shape)
    return None if strides is None else Value(value.base, value.offset, shape, strides, axis)


def _restride(
    old: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of `new` over the same floats, None if there are none. Dimensions of size 1 are
    dropped and adjacent dimensions merged into runs; the new shape must split each run evenly."""
    runs: list[list[int]] = []  # [size, stride of its last dimension]
    for size, stride in zip(old, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    result: list[int] = []
    left = 1  # size of the current run that is not yet split
    stride = 0
    queue = iter(runs)
    for size in new:
        if size == 1:
            result.append(0)
            continue
        if left == 1:
            left, stride = next(queue)
        if left % size:
            return None
        left //= size
        result.append(stride * left)
    return tuple(result) if left == 1 and next(queue, None) is None else None


def loops(
    shape: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], tuple[int, int], list[tuple[int, int]]]:
    """Two nested loops that walk several operands of one shape, after merging dimensions that are
    adjacent in all of them. Further dimensions are unrolled.

    Returns the extra offset of each operand for each unrolled round, the sizes of the outer and the
    inner loop, and the (outer, inner) strides of each operand."""
    dims = [(size, tuple(each[i] for each in strides)) for i, size in enumerate(shape) if size != 1]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in dims:
        if merged and all(
            outer == inner * size for outer, inner in zip(merged[-1][1], steps, strict=True)
        ):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    unit = (1, tuple(0 for _ in strides))
    merged = [unit] * (2 - len(merged)) + merged
    *unrolled, outer, inner = merged
    rounds = [
        tuple(
            sum(index * steps[k] for index, (_, steps) in zip(indices, unrolled, strict=True))
            for k in range(len(strides))
        )
        for indices in itertools.product(*(range(size) for size, _ in unrolled))
    ]
    return rounds, (outer[0], inner[0]), list(zip(outer[1], inner[1], strict=True))
