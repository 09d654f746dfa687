"""Handlers that lower arithmetic: row work, matrix products, attention. Each takes (lowering, node,
*arguments of the aten operation) and returns a Value."""

from math import frexp, inf, prod
from typing import Any

import torch
from torch.fx import Node

from baton.engine.cpu.lower import Lowering, Operand, operation
from baton.engine.cpu.rotation import complex_product
from baton.engine.cpu.values import (
    At,
    Attend,
    Complex,
    Constant,
    Micro,
    Product,
    Value,
    new_value,
)
from baton.engine.cpu.writes import written
from baton.engine.errors import CompileError

aten = torch.ops.aten
MOST_TERMS = 16  # of the products of each token's own small matrices

# ---- row work


@operation(aten.cat.default)
def cat(lowering: Lowering, node: Node, values: list[Operand], dim: int = 0) -> Value:
    level = lowering.row_level(*values)
    to = lowering.fresh(node, level)
    rank = len(to.shape) + 1
    dim %= rank
    if dim == to.axis or not all(isinstance(each, Value) for each in values):
        raise CompileError("it concatenates rows, or a row and a constant")
    index, start = dim - (dim > to.axis), 0
    for each in values:
        assert isinstance(each, Value)
        part = Value(to.base, start * to.strides[index], each.shape, to.strides, to.axis)
        if each.size:
            lowering.emit(level, "copy", part, (each, each.strides))
        start += each.shape[index]
    return to


@operation(aten.stack.default)
def stack(lowering: Lowering, node: Node, values: list[Operand], dim: int = 0) -> Value:
    """Each value is a slice of the result."""
    level = lowering.row_level(*values)
    to = lowering.fresh(node, level)
    dim %= len(to.shape) + 1
    if dim == to.axis or not all(isinstance(each, Value) for each in values):
        raise CompileError("it stacks rows, or a row and a constant")
    index = dim - (dim > to.axis)
    shape, strides = ((*of[:index], *of[index + 1 :]) for of in (to.shape, to.strides))
    for number, each in enumerate(values):
        assert isinstance(each, Value)
        start = number * to.strides[index]
        part = Value(to.base, start, shape, strides, to.axis - (dim < to.axis))
        lowering.emit(level, "copy", part, (each, each.strides))
    return to


ONE: dict[Any, str] = {
    **{aten.neg.default: "neg", aten.abs.default: "abs", aten.exp.default: "exp"},
    **{aten.log.default: "log", aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt"},
    **{aten.reciprocal.default: "reciprocal", aten.tanh.default: "tanh"},
    **{aten.sigmoid.default: "sigmoid", aten.silu.default: "silu", aten.relu.default: "relu"},
    **{aten.cos.default: "cos", aten.sin.default: "sin", aten.square.default: "square"},
    **{aten.expm1.default: "expm1", aten.log1p.default: "log1p", aten.floor.default: "floor"},
}
REDUCTIONS: dict[Any, str] = {
    **{aten.mean.dim: "mean", aten.sum.dim_IntList: "sum", aten.amax.default: "largest"},
}
TWO: dict[Any, str] = {
    **{
        aten.mul.Tensor: "mul",
        aten.div.Tensor: "div",
        aten.mul_.Tensor: "mul",
        aten.div_.Tensor: "div",
    },
    **{aten.logical_and.default: "mul", aten.logical_or.default: "max"},
    **{aten.maximum.default: "max", aten.minimum.default: "min"},
}


@operation(*ONE)
def one(lowering: Lowering, node: Node, value: Value) -> Value:
    return lowering.element(node, ONE[node.target], value)


COMPARISONS: dict[Any, tuple[str, float]] = {
    **{aten.gt.Scalar: ("above", 0.0), aten.ge.Scalar: ("above", -inf)},
    **{aten.lt.Scalar: ("below", 0.0), aten.le.Scalar: ("below", inf)},
}
"""The operation, and the direction of the neighbour that the number is replaced by: of two floats,
a <= x is a < the next float after x. So a NaN compares false, as in torch."""


@operation(*COMPARISONS)
def compare(lowering: Lowering, node: Node, value: Value, number: float) -> Value:
    """1 for true, 0 for false."""
    code, towards = COMPARISONS[node.target]
    if towards:
        number = float(torch.nextafter(torch.tensor(float(number)), torch.tensor(towards)))
    return lowering.element(node, code, value, x=float(number))


@operation(aten.where.self)
def where(lowering: Lowering, node: Node, condition: Operand, a: Any, b: Any) -> Value:
    return lowering.element(node, "where", condition, _operand(a), _operand(b))


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


LOGICAL = {aten.logical_and.default, aten.logical_or.default}  # 0 and 1 stand for false and true


@operation(*TWO)
def two(lowering: Lowering, node: Node, a: Any, b: Any) -> Value | Complex:
    return written(lowering, node, _two(lowering, node, a, b))


def _two(lowering: Lowering, node: Node, a: Any, b: Any) -> Value | Complex:
    if isinstance(a, Complex) or isinstance(b, Complex):
        return complex_product(lowering, node, a, b)
    if node.target in LOGICAL and any(_dtype(each) != torch.bool for each in node.args):
        raise CompileError(f"it takes {node.target} of numbers")
    code = TWO[node.target]
    if code == "mul" and isinstance(a, Value) and (number := _number(b)) is not None:
        return lowering.element(node, "times", a, x=number)
    if code == "div" and isinstance(a, Value) and abs(frexp(_number(b) or 0.0)[0]) == 0.5:
        return lowering.element(node, "times", a, x=1.0 / float(b))  # exact: a power of two
    if code == "mul" and isinstance(b, Value) and _number(a) is not None:
        return _two(lowering, node, b, a)
    return lowering.element(node, code, _operand(a), _operand(b))


@operation(aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor, aten.sub_.Tensor)
def add(lowering: Lowering, node: Node, a: Any, b: Any, *, alpha: float = 1) -> Value:
    return written(lowering, node, _sum(lowering, node, a, b, alpha))


def _sum(lowering: Lowering, node: Node, a: Any, b: Any, alpha: float) -> Value:
    negative = node.target in (aten.sub.Tensor, aten.sub_.Tensor)
    sign = -float(alpha) if negative else float(alpha)
    if isinstance(a, Value) and (number := _number(b)) is not None:
        return lowering.element(node, "add_to", a, x=sign * number)
    if isinstance(b, Value) and _number(a) is not None and sign == 1:
        return _sum(lowering, node, b, a, alpha)
    return lowering.element(node, "add", _operand(a), _operand(b), x=sign)


@operation(aten.rsub.Scalar)
def rsub(lowering: Lowering, node: Node, value: Value, number: float) -> Value:
    negated = lowering.element(node, "neg", value)
    return lowering.element(node, "add_to", negated, x=float(number))


@operation(*REDUCTIONS)
def reduce(
    lowering: Lowering, node: Node, value: Value, dims: list[int], keep: bool = False, **_: Any
) -> Value:
    """A reduction over dimensions that come last, or that are moved there first."""
    rank = len(value.shape) + 1
    wanted = {dim % rank for dim in dims}
    if value.axis in wanted:
        raise CompileError(f"it reduces dimensions {dims} of {rank}, the rows among them")
    gone = [dim - (dim > value.axis) for dim in sorted(wanted)]
    order = [i for i in range(len(value.shape)) if i not in gone] + gone
    shape, strides = (tuple(of[i] for i in order) for of in (value.shape, value.strides))
    axis = value.axis - sum(dim < value.axis for dim in wanted)
    value = lowering.together(Value(value.base, value.offset, shape, strides, axis))
    inner = prod(shape[len(shape) - len(gone) :])
    level = lowering.row_level(value)
    to = lowering.fresh(node, level)
    micro = Micro(
        REDUCTIONS[node.target],
        value.size // inner,
        inner,
        At(to.base, 0, 1, 0),
        At(value.base, value.offset, inner, 1),
    )
    lowering.append(level, micro, to, value)
    return to


@operation(aten.std.correction, aten.var.correction)
def spread(
    lowering: Lowering,
    node: Node,
    value: Value,
    dims: list[int] | None = None,
    *,
    correction: float | None = 1,
    keepdim: bool = False,
) -> Value:
    """Standard deviation or variance over the last dimension: the mean of squares around the mean."""
    rank = len(value.shape) + 1
    if dims is None or [dim % rank for dim in dims] != [rank - 1] or value.axis == rank - 1:
        raise CompileError(f"it takes the deviation over dimensions {dims} of {rank}")
    value = lowering.together(value)
    inner = value.shape[-1]
    outer = value.size // inner
    level = lowering.row_level(value)

    def made(shape: tuple[int, ...]) -> Value:
        return new_value(value.base.space, shape, value.axis, level)

    mean, around, squares = made((outer,)), made((outer, inner)), made((outer,))
    to = lowering.fresh(node, level)
    one = At(mean.base, 0, 1, 0)
    whole = At(around.base, 0, inner, 1)
    rows = At(value.base, value.offset, inner, 1)
    factor = inner / (inner - (1 if correction is None else correction))
    last = "sqrt" if node.target is aten.std.correction else "copy"
    for micro in (
        Micro("mean", outer, inner, one, rows),
        Micro("sub", outer, inner, whole, rows, one),
        Micro("square", outer, inner, whole, whole),
        Micro("mean", outer, inner, At(squares.base, 0, 1, 0), whole),
        Micro("times", 1, outer, At(squares.base, 0, 0, 1), At(squares.base, 0, 0, 1), x=factor),
        Micro(last, 1, outer, At(to.base, 0, 0, 1), At(squares.base, 0, 0, 1)),
    ):
        lowering.append(level, micro, to, value, mean, around, squares)
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
    inner = prod(shape)
    level = lowering.row_level(value)
    to = new_value(value.base.space, value.shape, value.axis, level)
    b, c = (None if each is None else At(each, 0, 0, 1) for each in (weight, bias))
    micro = Micro(
        "layer_norm",
        value.size // inner,
        inner,
        At(to.base, 0, inner, 1),
        At(value.base, value.offset, inner, 1),
        b,
        c,
        x=float(eps),
    )
    lowering.append(level, micro, to, value)
    return [to, None, None]


@operation(aten.embedding.default)
def embedding(lowering: Lowering, node: Node, table: Constant, ids: Value, *_: Any) -> Value:
    level = lowering.row_level(ids)
    to = lowering.fresh(node, level)
    code = "embed_bf16" if table.dtype == torch.bfloat16 else "embed_f32"
    number = At(ids.base, ids.offset, 0, 0)
    micro = Micro(code, 1, table.shape[1], At(to.base, 0, 0, 1), number, At(table, 0, 0, 0))
    lowering.append(level, micro, to, ids)
    return to


@operation(aten.index.Tensor)
def pick(lowering: Lowering, node: Node, value: Value, indices: list[Any]) -> Value:
    """Selects the rows that need logits. After the last attention only those are computed."""
    if indices.index("logit_rows") != value.axis or any(
        each not in (None, "logit_rows") for each in indices
    ):
        raise CompileError("it selects rows by something other than logits_to_keep")
    return value if lowering.late else lowering.gathered(value)


# ---- matrix products and attention


@operation(aten.mm.default)
def product(
    lowering: Lowering, node: Node, rows: Value, weight: Constant, bias: Constant | None = None
) -> Value:
    """rows [T, K] @ weight [K, N], where the weight is a constant."""
    if not isinstance(weight, torch.Tensor) or not isinstance(rows, Value):
        raise CompileError("it multiplies two computed matrices")
    rows = lowering.together(rows)
    level = lowering.row_level(rows) + 1
    to = lowering.fresh(node, level)
    exact = node in lowering.routers or weight.shape[1] == 1
    lowering.level(level).products.append(Product(rows, weight, bias, to.base, exact))
    lowering.use(rows, level)
    lowering.use(to, level)
    return to


@operation(aten.addmm.default)
def product_and_bias(lowering: Lowering, node: Node, bias: Any, rows: Value, weight: Any) -> Value:
    if not isinstance(bias, torch.Tensor):
        raise CompileError("it adds something other than a bias to a product")
    return product(lowering, node, rows, weight, bias)


@operation(aten.linear.default)
def linear(
    lowering: Lowering, node: Node, rows: Value, weight: Constant, bias: Constant | None = None
) -> Value:
    return product(lowering, node, rows, weight.t(), bias)


@operation(aten.bmm.default)
def outer_product(lowering: Lowering, node: Node, a: Operand, b: Operand) -> Value:
    """[1, m, 1] @ [1, 1, n], one of them with rows: rotary angles in older model code. Or [T, m, k] @
    [T, k, n], small matrices of each token: k outer products are added up, in their order."""
    shapes = [tuple(each.meta["val"].shape) for each in node.args]  # type: ignore[union-attr]
    if shapes[0][2] == 1:
        return lowering.element(node, "mul", a, b)
    if isinstance(a, Value) and isinstance(b, torch.Tensor) and (a.axis, len(b)) == (1, 1):
        return product(lowering, node, a, b[0])  # [1, T, k] @ [1, k, n]
    if not (isinstance(a, Value) and isinstance(b, Value) and a.axis == b.axis == 0):
        raise CompileError("it multiplies two computed matrices")
    (m, k), n = a.shape, b.shape[1]
    if k > MOST_TERMS:
        raise CompileError(f"it multiplies two computed matrices, with {k} terms")
    level = lowering.row_level(a, b)
    total = lowering.fresh(node, level)
    term = new_value(total.base.space, (m, n), 0, level)
    for i in range(k):
        left = Value(a.base, a.offset + i * a.strides[1], (m, n), (a.strides[0], 0), 0)
        right = Value(b.base, b.offset + i * b.strides[0], (m, n), (0, b.strides[1]), 0)
        to = term if i else total
        lowering.emit(level, "mul", to, (left, left.strides), (right, right.strides))
        if i:
            lowering.emit(level, "add", total, (total, total.strides), (term, term.strides), x=1.0)
    return total


@operation(torch.ops.baton.attend.default)
def attend(
    lowering: Lowering, node: Node, query: Value, key: Value, value: Value, layer: int
) -> Value:
    query, key, value = (lowering.together(each) for each in (query, key, value))
    if any(part.axis != 2 or part.shape[0] != 1 for part in (query, key, value)):
        raise CompileError("its attention has tensors of another shape than [1, heads, tokens, D]")
    level = lowering.row_level(query, key, value) + 1
    to = lowering.fresh(node, level)
    lowering.level(level).attends.append(Attend(layer, query, key, value, to.base))
    for part in (query, key, value, to):
        lowering.use(part, level)
    lowering.late = layer == len(lowering.captured.layer_params) - 1
    return to


def _dtype(given: Any) -> torch.dtype | None:
    return given.meta["val"].dtype if isinstance(given, Node) else getattr(given, "dtype", None)


def _number(given: Any) -> float | None:
    """The value of a number or of a constant with one element; None for anything else."""
    if isinstance(given, (int, float)):
        return float(given)
    if isinstance(given, torch.Tensor) and given.numel() == 1:
        return float(given)
    return None


def _operand(given: Any) -> Operand:
    if isinstance(given, (Value, torch.Tensor)):
        return given
    return torch.tensor(float(given))
