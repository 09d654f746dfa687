"""Values of a program while it is being made: what one token (or one logits row) has of a tensor.

A traced tensor [1, T, heads, D] is, for each of its T rows, the numbers [1, heads, D] somewhere in a
run of floats (a Base). Views, transposes and slices only change how those are walked through, and
cost nothing; only arithmetic makes a new Base.
"""

import itertools
from dataclasses import dataclass
from enum import IntEnum
from math import prod

from baton.engine.cpu.capture import LOGIT_ROWS, TOKENS
from baton.engine.errors import CompileError


class Space(IntEnum):
    """What the rows of a value are."""

    TOKENS = 0
    LOGIT_ROWS = 1  # the rows that need logits


@dataclass(eq=False, slots=True)
class Base:
    """A run of floats per row, made once. `level` orders the stages: row work at even levels,
    matrix products and attention at odd ones."""

    space: Space
    width: int
    level: int
    parent: "Base | None" = None  # part of a larger one, from `offset` on
    offset: int = 0
    last_use: int = -1  # level
    kind: str = "arena"  # or ids, positions, logits

    def root(self) -> tuple["Base", int]:
        """The whole it is a part of, and where."""
        if self.parent is None:
            return self, 0
        base, offset = self.parent.root()
        return base, offset + self.offset


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor's numbers in one row: `shape` without the row dimension, which stood at `axis`."""

    base: Base
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    axis: int

    @property
    def contiguous(self) -> bool:
        """Whether its numbers stand side by side in order."""
        wanted = dense(self.shape)
        return all(
            size == 1 or stride == want
            for size, stride, want in zip(self.shape, self.strides, wanted, strict=True)
        )

    @property
    def size(self) -> int:
        """Numbers of a row."""
        return prod(self.shape)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of numbers side by side."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)] if shape else ()


def split_rows(shape: tuple[int, ...]) -> tuple[Space, int, tuple[int, ...]]:
    """Which rows a traced tensor has, at which axis, and its shape without them."""
    axes = [i for i, size in enumerate(shape) if size in (TOKENS, LOGIT_ROWS)]
    if len(axes) != 1 or any(size > TOKENS and size % TOKENS == 0 for size in shape):
        raise CompileError(f"tokens meet tokens outside attention: a tensor of {list(shape)}")
    axis = axes[0]
    space = Space.TOKENS if shape[axis] == TOKENS else Space.LOGIT_ROWS
    return space, axis, shape[:axis] + shape[axis + 1 :]


def reshaped(
    value: Value, before: tuple[int, ...], shape: tuple[int, ...], axis: int
) -> Value | None:
    """The same numbers in another shape; None if they would have to be moved first. `before` is
    what stood in front of the row axis, `axis` where it is now."""
    if prod(before) != prod(shape[:axis]):
        raise CompileError("a reshape mixes the numbers of several tokens")
    strides = _restride(value.shape, value.strides, shape)
    return None if strides is None else Value(value.base, value.offset, shape, strides, axis)


def _restride(
    old: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of `new` over the same floats: dimensions of 1 fall out, adjacent ones melt together
    where they can, and each melted run must be cut by the new shape at its own borders."""
    runs: list[list[int]] = []  # [size, stride of its last dimension]
    for size, stride in zip(old, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    result: list[int] = []
    left = 1  # of the current run, not yet cut
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
    """Walk several operands of one shape together in two loops, outer and inner, after melting
    dimensions that are side by side in all of them. What does not fit two loops is unrolled: the
    first result lists, for each round, the operands' extra offsets."""
    dims = [(size, tuple(each[i] for each in strides)) for i, size in enumerate(shape) if size != 1]
    melted: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in dims:
        if melted and all(
            outer == inner * size for outer, inner in zip(melted[-1][1], steps, strict=True)
        ):
            melted[-1] = (melted[-1][0] * size, steps)
        else:
            melted.append((size, steps))
    nothing = (1, tuple(0 for _ in strides))
    melted = [nothing] * (2 - len(melted)) + melted
    *unrolled, outer, inner = melted
    rounds = [
        tuple(
            sum(index * steps[k] for index, (_, steps) in zip(indices, unrolled, strict=True))
            for k in range(len(strides))
        )
        for indices in itertools.product(*(range(size) for size, _ in unrolled))
    ]
    return rounds, (outer[0], inner[0]), list(zip(outer[1], inner[1], strict=True))
