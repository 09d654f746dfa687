"""Handlers that lower what routers of mixtures of experts do with scores, and grouped products."""

from math import prod
from typing import Any

import torch
from torch.fx import Node

from baton.engine.cpu.lower import Lowering, Operand, operation
from baton.engine.cpu.values import At, Constant, Grouped, Micro, Value, new_value
from baton.engine.cpu.writes import is_read_under_another_name
from baton.engine.errors import CompileError

aten = torch.ops.aten


@operation(aten.topk.default)
def topk(
    lowering: Lowering,
    node: Node,
    value: Value,
    count: int,
    dim: int = -1,
    largest: bool = True,
    ordered: bool = True,
) -> list[Value]:
    """Values and places of the largest, always in order."""
    if not largest:
        raise CompileError("it takes the smallest of its scores")
    value = _last(lowering, value, dim, "takes the largest")
    outer, inner = _loops(value)
    level = lowering.row_level(value)
    places = new_value(value.base.space, (*value.shape[:-1], count), value.axis, level)
    to, a = At(places.base, 0, count, 1), At(value.base, value.offset, inner, 1)
    lowering.append(level, Micro("topk", outer, inner, to, a, x=float(count)), places, value)
    return [_gathered(lowering, value, places), places]


@operation(aten.gather.default)
def gather(
    lowering: Lowering, node: Node, value: Value, dim: int, places: Value, **_: Any
) -> Value:
    return _gathered(lowering, _last(lowering, value, dim, "gathers"), places)


def _gathered(lowering: Lowering, value: Value, places: Value) -> Value:
    """The numbers of the last dimension at these places."""
    places = _beside(lowering, value, places)
    (outer, inner), count = _loops(value), places.shape[-1]
    level = lowering.row_level(value, places)
    found = new_value(value.base.space, places.shape, value.axis, level)
    to, a, b = (
        At(each.base, each.offset, step, 1)
        for each, step in ((found, count), (value, inner), (places, count))
    )
    micro = Micro("gather", outer, count, to, a, b, x=float(inner))
    lowering.append(level, micro, found, value, places)
    return found


@operation(aten.scatter_.value, aten.scatter.value)
def scatter(
    lowering: Lowering, node: Node, value: Value, dim: int, places: Value, number: float
) -> Value:
    """One number to places of the last dimension."""
    if is_read_under_another_name(node):
        raise CompileError(f"it reads a tensor again after {node.target}")
    value = _last(lowering, value, dim, "scatters")
    places = _beside(lowering, value, places)
    (outer, inner), count = _loops(value), places.shape[-1]
    level = lowering.row_level(value, places)
    result = new_value(value.base.space, value.shape, value.axis, level)
    lowering.emit(level, "copy", result, (value, value.strides))
    to, a = At(result.base, 0, inner, 1), At(places.base, places.offset, count, 1)
    micro = Micro("scatter", outer, count, to, a, x=float(inner), y=float(number))
    lowering.append(level, micro, result, places)
    return result


@operation(aten._softmax.default)
def softmax(
    lowering: Lowering, node: Node, value: Value, dim: int, half_to_float: bool = False
) -> Value:
    """Of the last dimension."""
    value = _last(lowering, value, dim, "takes a softmax")
    outer, inner = _loops(value)
    level = lowering.row_level(value)
    peak, total = (new_value(value.base.space, (outer,), value.axis, level) for _ in range(2))
    result = new_value(value.base.space, value.shape, value.axis, level)
    whole, rows = At(result.base, 0, inner, 1), At(value.base, value.offset, inner, 1)
    for micro in (
        Micro("largest", outer, inner, At(peak.base, 0, 1, 0), rows),
        Micro("sub", outer, inner, whole, rows, At(peak.base, 0, 1, 0)),
        Micro("exp", outer, inner, whole, whole),
        Micro("sum", outer, inner, At(total.base, 0, 1, 0), whole),
        Micro("div", outer, inner, whole, whole, At(total.base, 0, 1, 0)),
    ):
        lowering.append(level, micro, result, value, peak, total)
    return result


@operation(aten.zeros_like.default, aten.ones_like.default)
def filled(lowering: Lowering, node: Node, value: Value, **_: Any) -> Value:
    number = torch.tensor(float(node.target is aten.ones_like.default))
    level = lowering.row_level(value)
    to = lowering.fresh(node, level)
    lowering.emit(level, "copy", to, (number, (0,) * len(to.shape)))
    return to


@operation(aten.masked_fill.Scalar)
def masked_fill(
    lowering: Lowering, node: Node, value: Operand, mask: Operand, number: float
) -> Value:
    return lowering.element(node, "where", mask, torch.tensor(float(number)), value)


@operation(aten.bitwise_not.default, aten.logical_not.default)
def negated(lowering: Lowering, node: Node, value: Value) -> Value:
    """1 for false, 0 for true."""
    if node.args[0].meta["val"].dtype != torch.bool:  # type: ignore[union-attr]
        raise CompileError(f"it takes {node.target} of numbers")
    return lowering.element(node, "where", value, torch.tensor(0.0), torch.tensor(1.0))


@operation(aten.softplus.default)
def softplus(
    lowering: Lowering, node: Node, value: Value, beta: float = 1.0, threshold: float = 20.0
) -> Value:
    """log(1 + e^(beta x)) / beta, and x itself where beta x is above the threshold."""
    scaled = lowering.element(node, "times", value, x=float(beta))
    curved = lowering.element(node, "log1p", lowering.element(node, "exp", scaled))
    above = lowering.element(node, "above", scaled, x=float(threshold))
    divided = lowering.element(node, "times", curved, x=1.0 / float(beta))
    return lowering.element(node, "where", above, value, divided)


@operation(torch.ops.baton.grouped.default)
def grouped(
    lowering: Lowering,
    node: Node,
    rows: Value,
    chosen: Value,
    weight: Constant,
    bias: Constant | None = None,
) -> Value:
    """rows [T, K] or [T, slots, K] times those of the weights [experts, N, K] that `chosen` names."""
    rows, chosen = lowering.together(rows), lowering.together(chosen)
    if rows.axis or chosen.axis or len(chosen.shape) != 1 or not isinstance(weight, torch.Tensor):
        raise CompileError("its experts have tensors of another shape than [tokens, slots]")
    level = lowering.row_level(rows, chosen) + 1
    to = new_value(rows.base.space, (*chosen.shape, weight.shape[1]), 0, level)
    lowering.level(level).grouped.append(Grouped(rows, chosen, weight, bias, to.base))
    for each in (rows, chosen, to):
        lowering.use(each, level)
    return to


def _last(lowering: Lowering, value: Value, dim: int, what: str) -> Value:
    """The value, contiguous. CompileError if `dim` is not its last dimension, or is that of the rows."""
    rank = len(value.shape) + 1
    if dim % rank != rank - 1 or value.axis == rank - 1:
        raise CompileError(f"it {what} over dimension {dim} of {rank}")
    return lowering.together(value)


def _loops(value: Value) -> tuple[int, int]:
    """How many runs it has, and how long each is."""
    return prod(value.shape[:-1]), value.shape[-1]


def _beside(lowering: Lowering, value: Value, places: Value) -> Value:
    """Places in the last dimension of each run of the value, contiguous."""
    if (places.axis, places.shape[:-1]) != (value.axis, value.shape[:-1]):
        raise CompileError(f"it finds places of {places.shape} in a value of {value.shape}")
    return lowering.together(places)
