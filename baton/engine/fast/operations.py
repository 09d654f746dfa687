"""How each aten operation is lowered. Handlers take (lowering, node, *arguments) and give a Value."""

import operator
from typing import Any

import torch
from torch.fx import Node

from baton.engine.fast.errors import NotNative
from baton.engine.fast.lower import (
    At,
    Attend,
    Constant,
    Lowering,
    Micro,
    Operand,
    Product,
    operation,
    shape_of,
)
from baton.engine.fast.values import Base, Space, Value, dense, reshaped, split_rows

aten = torch.ops.aten

# ---- views


@operation(
    *(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default),
    *(aten.lift_fresh_copy.default, aten._to_copy.default),
)
def same(lowering: Lowering, node: Node, value: Value, **_: Any) -> Value:
    """All arithmetic is in fp32, so a change of dtype changes nothing, unless it cuts."""
    before = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    after = node.meta["val"].dtype
    if before.is_floating_point and not after.is_floating_point:
        raise NotNative("it rounds to integers")
    return value


@operation(
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
)
def view(lowering: Lowering, node: Node, value: Value, *_: Any) -> Value:
    _, axis, shape = split_rows(shape_of(node))
    before = value.shape[: value.axis]
    seen = reshaped(value, before, shape, axis)
    if seen is None:
        seen = reshaped(lowering._moved(value), before, shape, axis)
    assert seen is not None
    return seen


@operation(aten.expand.default)
def expand(lowering: Lowering, node: Node, value: Value, *_: Any) -> Value:
    _, axis, shape = split_rows(shape_of(node))
    added = len(shape) - len(value.shape)
    if axis != value.axis + added:
        raise NotNative("it repeats rows")
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


@operation(aten.slice.Tensor)
def slice_(
    lowering: Lowering, node: Node, value: Value, dim: int = 0, start: int | None = 0, *rest: Any
) -> Value:
    step = rest[1] if len(rest) > 1 else 1
    _, axis, shape = split_rows(shape_of(node))
    dim %= len(value.shape) + 1
    if dim == axis:
        if shape == value.shape and not start:
            return value
        raise NotNative("it picks out rows by number")
    index = dim - (dim > axis)
    size, stride = value.shape[index], value.strides[index]
    start = 0 if start is None else max(0, start + size) if start < 0 else min(start, size)
    strides = value.strides[:index] + (stride * step,) + value.strides[index + 1 :]
    return Value(value.base, value.offset + start * stride, shape, strides, axis)


@operation(aten.select.int)
def select(lowering: Lowering, node: Node, value: Value, dim: int, number: int) -> Value:
    dim %= len(value.shape) + 1
    if dim == value.axis:
        raise NotNative("it picks out rows by number")
    index = dim - (dim > value.axis)
    start = value.offset + (number % value.shape[index]) * value.strides[index]
    shape = value.shape[:index] + value.shape[index + 1 :]
    strides = value.strides[:index] + value.strides[index + 1 :]
    return Value(value.base, start, shape, strides, value.axis - (dim < value.axis))


@operation(aten.split.Tensor, aten.split_with_sizes.default)
def split(
    lowering: Lowering, node: Node, value: Value, sizes: int | list[int], dim: int = 0
) -> list[Value]:
    dim %= len(value.shape) + 1
    if dim == value.axis:
        raise NotNative("it splits the rows")
    index = dim - (dim > value.axis)
    total = value.shape[index]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    parts, start = [], 0
    for size in sizes:
        shape = value.shape[:index] + (size,) + value.shape[index + 1 :]
        offset = value.offset + start * value.strides[index]
        parts.append(Value(value.base, offset, shape, value.strides, value.axis))
        start += size
    return parts


@operation(operator.getitem)
def getitem(lowering: Lowering, node: Node, values: list[Value | None], number: int) -> Value:
    found = values[number]
    if found is None:
        raise NotNative(f"it uses result {number} of {node.args[0]}")
    return found


# ---- row work


@operation(aten.cat.default)
def cat(lowering: Lowering, node: Node, values: list[Operand], dim: int = 0) -> Value:
    level = lowering.row_level(*values)
    to = lowering.fresh(node, level)
    rank = len(to.shape) + 1
    dim %= rank
    if dim == to.axis or not all(isinstance(each, Value) for each in values):
        raise NotNative("it joins rows, or a row and a constant")
    index, start = dim - (dim > to.axis), 0
    for each in values:
        assert isinstance(each, Value)
        part = Value(to.base, start * to.strides[index], each.shape, to.strides, to.axis)
        if each.size:
            lowering.emit(level, "copy", part, (each, each.strides))
        start += each.shape[index]
    return to


ONE = {
    **{aten.neg.default: "neg", aten.abs.default: "abs", aten.exp.default: "exp"},
    **{aten.log.default: "log", aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt"},
    **{aten.reciprocal.default: "reciprocal", aten.tanh.default: "tanh"},
    **{aten.sigmoid.default: "sigmoid", aten.silu.default: "silu", aten.relu.default: "relu"},
    **{aten.cos.default: "cos", aten.sin.default: "sin", aten.square.default: "square"},
}
TWO = {
    **{aten.mul.Tensor: "mul", aten.div.Tensor: "div"},
    **{aten.maximum.default: "max", aten.minimum.default: "min"},
}


@operation(*ONE)
def one(lowering: Lowering, node: Node, value: Value) -> Value:
    return lowering.element(node, ONE[node.target], value)


@operation(aten.gelu.default)
def gelu(lowering: Lowering, node: Node, value: Value, *, approximate: str = "none") -> Value:
    return lowering.element(node, "gelu_tanh" if approximate == "tanh" else "gelu", value)


@operation(aten.pow.Tensor_Scalar)
def power(lowering: Lowering, node: Node, value: Value, exponent: float) -> Value:
    code = {1: "copy", 2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    return lowering.element(node, code.get(exponent, "pow"), value, x=float(exponent))


@operation(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(
    lowering: Lowering, node: Node, value: Value, *bounds: float | None, **named: Any
) -> Value:
    low, high = named.get("min"), named.get("max")
    if node.target is aten.clamp_max.default:
        high = bounds[0]
    else:
        low, high = (*bounds, low, high)[:2] if bounds else (low, high)
    x = float("-inf") if low is None else float(low)
    y = float("inf") if high is None else float(high)
    return lowering.element(node, "clamp", value, x=x, y=y)


@operation(*TWO)
def two(lowering: Lowering, node: Node, a: Any, b: Any) -> Value:
    code = TWO[node.target]
    if code in ("mul", "div") and isinstance(a, Value) and _number(b) is not None:
        number = _number(b)
        assert number is not None
        return lowering.element(node, "times", a, x=number if code == "mul" else 1.0 / number)
    if code == "mul" and isinstance(b, Value) and _number(a) is not None:
        return two(lowering, node, b, a)
    return lowering.element(node, code, _operand(a), _operand(b))


@operation(aten.add.Tensor, aten.sub.Tensor)
def add(lowering: Lowering, node: Node, a: Any, b: Any, *, alpha: float = 1) -> Value:
    sign = -float(alpha) if node.target is aten.sub.Tensor else float(alpha)
    if isinstance(a, Value) and (number := _number(b)) is not None:
        return lowering.element(node, "add_to", a, x=sign * number)
    if isinstance(b, Value) and _number(a) is not None and sign == 1:
        return add(lowering, node, b, a)
    return lowering.element(node, "add", _operand(a), _operand(b), x=sign)


@operation(aten.rsub.Scalar)
def rsub(lowering: Lowering, node: Node, value: Value, number: float) -> Value:
    negated = lowering.element(node, "neg", value)
    return lowering.element(node, "add_to", negated, x=float(number))


@operation(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
def reduce(
    lowering: Lowering, node: Node, value: Value, dims: list[int], keep: bool = False, **_: Any
) -> Value:
    """Over the last dimensions."""
    rank = len(value.shape) + 1
    wanted = sorted(dim % rank for dim in dims)
    if wanted != list(range(rank - len(wanted), rank)) or value.axis in wanted:
        raise NotNative(f"it sums over dimensions {dims} of {rank}")
    value = lowering.together(value)
    inner = 1
    for size in value.shape[len(value.shape) - len(wanted) :]:
        inner *= size
    level = lowering.row_level(value)
    to = lowering.fresh(node, level)
    names = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum", aten.amax.default: "largest"}
    micro = Micro(
        names[node.target],
        value.size // inner,
        inner,
        At(to.base, 0, 1, 0),
        At(value.base, value.offset, inner, 1),
    )
    _append(lowering, level, micro, to, value)
    return to


@operation(aten.native_layer_norm.default)
def layer_norm(
    lowering: Lowering,
    node: Node,
    value: Value,
    shape: list[int],
    weight: Constant | None,
    bias: Constant | None,
    eps: float,
) -> list[Value | None]:
    value = lowering.together(value)
    inner = 1
    for size in shape:
        inner *= size
    level = lowering.row_level(value)
    base = Base(value.base.space, value.size, level)
    to = Value(base, 0, value.shape, dense(value.shape), value.axis)
    constants = [None if each is None else At(each, 0, 0, 1) for each in (weight, bias)]
    micro = Micro(
        "layer_norm",
        value.size // inner,
        inner,
        At(base, 0, inner, 1),
        At(value.base, value.offset, inner, 1),
        *constants,
        x=float(eps),
    )
    _append(lowering, level, micro, to, value)
    return [to, None, None]


@operation(aten.embedding.default)
def embedding(lowering: Lowering, node: Node, table: Constant, ids: Value, *_: Any) -> Value:
    level = lowering.row_level(ids)
    to = lowering.fresh(node, level)
    code = "embed_bf16" if table.dtype == torch.bfloat16 else "embed_f32"
    number = At(ids.base, ids.offset, 0, 0)
    micro = Micro(code, 1, table.shape[1], At(to.base, 0, 0, 1), number, At(table, 0, 0, 0))
    _append(lowering, level, micro, to, ids)
    return to


@operation(aten.index.Tensor)
def pick(lowering: Lowering, node: Node, value: Value, indices: list[Any]) -> Value:
    """The rows that need logits. What they need lies in other threads' rows: a barrier goes first."""
    if indices.index("picks") != value.axis or any(each not in (None, "picks") for each in indices):
        raise NotNative("it picks out rows by something else than logits_to_keep")
    value = lowering.together(value)
    level = lowering.row_level(value) + 2
    to = lowering.fresh(node, level)
    source = At(value.base, value.offset, 0, 1, picked=True)
    micro = Micro("copy", 1, value.size, At(to.base, 0, 0, 1), source)
    _append(lowering, level, micro, to, value)
    return to


# ---- matrix products and attention


@operation(aten.mm.default)
def product(
    lowering: Lowering, node: Node, rows: Value, weight: Constant, bias: Constant | None = None
) -> Value:
    """rows [T, K] @ weight [K, N], where the weight is a constant."""
    if not isinstance(weight, torch.Tensor) or not isinstance(rows, Value):
        raise NotNative("it multiplies what it computed with what it computed")
    rows = lowering.together(rows)
    level = lowering.row_level(rows) + 1
    to = lowering.fresh(node, level)
    lowering.level(level).products.append(Product(rows, weight, bias, to.base))
    lowering.use(rows, level)
    lowering.use(to, level)
    return to


@operation(aten.addmm.default)
def product_and_bias(lowering: Lowering, node: Node, bias: Any, rows: Value, weight: Any) -> Value:
    if not isinstance(bias, torch.Tensor):
        raise NotNative("it adds something else than a bias to a product")
    return product(lowering, node, rows, weight, bias)


@operation(aten.linear.default)
def linear(
    lowering: Lowering, node: Node, rows: Value, weight: Constant, bias: Constant | None = None
) -> Value:
    return product(lowering, node, rows, weight.t(), bias)


@operation(aten.bmm.default)
def outer_product(lowering: Lowering, node: Node, a: Operand, b: Operand) -> Value:
    """[1, m, 1] @ [1, 1, n], one of them of rows: how older code makes its rotary angles."""
    shapes = [tuple(each.meta["val"].shape) for each in node.args]  # type: ignore[union-attr]
    if shapes[0][2] != 1:
        raise NotNative("it multiplies what it computed with what it computed")
    return lowering.element(node, "mul", a, b)


@operation(torch.ops.baton.attend.default)
def attend(
    lowering: Lowering, node: Node, query: Value, key: Value, value: Value, layer: int
) -> Value:
    parts = [lowering.together(each) for each in (query, key, value)]
    if any(part.axis != 2 or part.shape[0] != 1 for part in parts):
        raise NotNative("attention's rows are not where they should be")
    level = lowering.row_level(*parts) + 1
    to = lowering.fresh(node, level)
    lowering.level(level).attends.append(Attend(layer, *parts, to.base))
    for part in (*parts, to):
        lowering.use(part, level)
    return to


def _append(lowering: Lowering, level: int, micro: Micro, to: Value, *used: Value) -> None:
    lowering.level(level).rows[to.base.space].append(micro)
    for value in (to, *used):
        lowering.use(value, level)


def _number(given: Any) -> float | None:
    """A number, or a constant of one element."""
    if isinstance(given, (int, float)):
        return float(given)
    if isinstance(given, torch.Tensor) and given.numel() == 1:
        return float(given)
    return None


def _operand(given: Any) -> Operand:
    if isinstance(given, (Value, torch.Tensor)):
        return given
    return torch.tensor(float(given))
