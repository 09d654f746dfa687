"""Handlers that lower views, which are free or cost a copy. Each takes (lowering, node, *arguments of
the aten operation)."""

import operator
from typing import Any

import torch
from torch.fx import Node

from baton.engine.cpu.lower import Lowering, Operand, operation, shape_of
from baton.engine.cpu.values import Value, reshaped, split_rows
from baton.engine.errors import CompileError

aten = torch.ops.aten


@operation(
    *(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default),
    *(aten.lift_fresh_copy.default, aten._to_copy.default),
)
def same(lowering: Lowering, node: Node, value: Value, **_: Any) -> Value:
    """All arithmetic is in fp32, so a change of dtype has no effect unless it rounds to integers."""
    before = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    after = node.meta["val"].dtype
    if before.is_floating_point and not after.is_floating_point:
        raise CompileError("it rounds to integers")
    return value


@operation(
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
)
def view(lowering: Lowering, node: Node, value: Value, *_: Any) -> Value:
    axis, shape = split_rows(shape_of(node))[1:]
    before = value.shape[: value.axis]
    seen = reshaped(value, before, shape, axis)
    if seen is None:
        seen = reshaped(lowering._moved(value), before, shape, axis)
    assert seen is not None
    return seen


@operation(aten.expand.default)
def expand(lowering: Lowering, node: Node, value: Value, *_: Any) -> Value:
    axis, shape = split_rows(shape_of(node))[1:]
    added = len(shape) - len(value.shape)
    if axis != value.axis + added:
        raise CompileError("it repeats rows")
    strides = (0,) * added + tuple(
        0 if had == 1 else step for had, step in zip(value.shape, value.strides, strict=True)
    )
    return Value(value.base, value.offset, shape, strides, axis)


@operation(aten.transpose.int, aten.permute.default, aten.t.default)
def permute(lowering: Lowering, node: Node, value: Value, *order: Any) -> Value:
    rank = len(value.shape) + 1
    dims = list(range(rank))
    if node.target is aten.permute.default:
        dims = [dim % rank for dim in order[0]]
    else:
        first, second = order if order else (0, 1)
        dims[first], dims[second] = dims[second], dims[first]
    full = [*value.shape[: value.axis], 0, *value.shape[value.axis :]]
    steps = [*value.strides[: value.axis], 0, *value.strides[value.axis :]]
    axis = dims.index(value.axis)
    rest = dims[:axis] + dims[axis + 1 :]
    return Value(
        value.base,
        value.offset,
        tuple(full[dim] for dim in rest),
        tuple(steps[dim] for dim in rest),
        axis,
    )


@operation(aten.new_empty.default, aten.empty_like.default)
def empty(lowering: Lowering, node: Node, value: Value, *_: Any, **__: Any) -> Value:
    """Memory that copy_ fills in parts."""
    to = lowering.fresh(node, 0)
    lowering.unwritten[to.base] = []
    return to


@operation(aten.copy_.default)
def copy(lowering: Lowering, node: Node, part: Value, source: Operand, *_: Any) -> Value:
    if part.base not in lowering.unwritten:
        raise CompileError("it writes into a tensor that was read before")
    lowering.unwritten[part.base].append((part, source))
    return part


@operation(aten.repeat.default)
def repeat(lowering: Lowering, node: Node, value: Value, times: list[int]) -> Value:
    """Of dimensions of one number only, and new ones in front: those are strides of 0."""
    axis, shape = split_rows(shape_of(node))[1:]
    added = len(shape) - len(value.shape)
    full = (1,) * added + value.shape
    if axis != value.axis + added or times[axis] != 1:
        raise CompileError("it repeats rows")
    if any(has not in (1, wants) for has, wants in zip(full, shape, strict=True)):
        raise CompileError("it repeats a dimension of several numbers")
    strides = (0,) * added + tuple(
        0 if had == 1 else step for had, step in zip(value.shape, value.strides, strict=True)
    )
    return Value(value.base, value.offset, shape, strides, axis)


@operation(aten.slice.Tensor)
def slice_(
    lowering: Lowering, node: Node, value: Value, dim: int = 0, start: int | None = 0, *rest: Any
) -> Value:
    step = rest[1] if len(rest) > 1 else 1
    axis, shape = split_rows(shape_of(node))[1:]
    dim %= len(value.shape) + 1
    if dim == axis:
        if shape == value.shape and not start:
            return value
        raise CompileError("it selects rows by index")
    index = dim - (dim > axis)
    size, stride = value.shape[index], value.strides[index]
    start = 0 if start is None else max(0, start + size) if start < 0 else min(start, size)
    strides = (*value.strides[:index], stride * step, *value.strides[index + 1 :])
    return Value(value.base, value.offset + start * stride, shape, strides, axis)


@operation(aten.select.int)
def select(lowering: Lowering, node: Node, value: Value, dim: int, number: int) -> Value:
    index = _index(value, dim)
    start = value.offset + (number % value.shape[index]) * value.strides[index]
    shape = value.shape[:index] + value.shape[index + 1 :]
    strides = value.strides[:index] + value.strides[index + 1 :]
    return Value(value.base, start, shape, strides, value.axis - (index < value.axis))


@operation(aten.split.Tensor, aten.split_with_sizes.default)
def split(
    lowering: Lowering, node: Node, value: Value, sizes: int | list[int], dim: int = 0
) -> list[Value]:
    index = _index(value, dim)
    total = value.shape[index]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    parts, start = [], 0
    for size in sizes:
        shape = (*value.shape[:index], size, *value.shape[index + 1 :])
        offset = value.offset + start * value.strides[index]
        parts.append(Value(value.base, offset, shape, value.strides, value.axis))
        start += size
    return parts


@operation(operator.getitem)
def getitem(lowering: Lowering, node: Node, values: list[Value | None], number: int) -> Value:
    found = values[number]
    if found is None:
        raise CompileError(f"it uses result {number} of {node.args[0]}")
    return found


VIEWS = {
    *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.transpose.int),
    *(aten.permute.default, aten.t.default, aten.slice.Tensor, aten.select.int, aten.alias.default),
    *(aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem),
}
"""Operations whose result shares the memory of their first argument."""


def _index(value: Value, dim: int) -> int:
    """Where this dimension of the traced tensor is in the value's shape."""
    dim %= len(value.shape) + 1
    if dim == value.axis:
        raise CompileError("it selects rows by index")
    return dim - (dim > value.axis)
