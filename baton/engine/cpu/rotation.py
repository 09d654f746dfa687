"""Handlers that lower complex numbers, by which some models turn rotary pairs."""

from typing import Any

import torch
from torch.fx import Node

from baton.engine.cpu.lower import Lowering, operation, shape_of
from baton.engine.cpu.values import Complex, Value
from baton.engine.cpu.views import select
from baton.engine.errors import CompileError

aten = torch.ops.aten


@operation(aten.polar.default)
def polar(lowering: Lowering, node: Node, length: Value, angle: Value) -> Complex:
    real, imaginary = (lowering.element(node, code, angle) for code in ("cos", "sin"))
    return Complex(
        lowering.element(node, "mul", length, real),
        lowering.element(node, "mul", length, imaginary),
    )


@operation(aten.view_as_complex.default)
def as_complex(lowering: Lowering, node: Node, value: Value) -> Complex:
    """The last dimension holds the two parts."""
    return Complex(*(select(lowering, node, value, -1, part) for part in (0, 1)))


@operation(aten.view_as_real.default)
def as_real(lowering: Lowering, node: Node, value: Complex) -> Value:
    level = lowering.row_level(value.real, value.imaginary)
    to = lowering.fresh(node, level)
    axis = len(shape_of(node)) - 1
    for number, part in enumerate((value.real, value.imaginary)):
        place = Value(to.base, number, to.shape[:-1], to.strides[:-1], to.axis)
        if to.axis == axis or part.shape != place.shape:
            raise CompileError("it takes the parts of complex numbers of another shape")
        lowering.emit(level, "copy", place, (part, part.strides))
    return to


def complex_product(lowering: Lowering, node: Node, a: Any, b: Any) -> Complex:
    """Of two complex numbers, or of one and a real one."""
    if not isinstance(a, Complex):
        a, b = b, a
    if isinstance(b, int | float):
        return Complex(
            *(lowering.element(node, "times", part, x=float(b)) for part in (a.real, a.imaginary))
        )
    if not isinstance(b, Complex):
        raise CompileError("it multiplies complex numbers by a tensor of real ones")

    def product(left: Value, right: Value) -> Value:
        return lowering.element(node, "mul", left, right)

    rr, ii = product(a.real, b.real), product(a.imaginary, b.imaginary)
    ri, ir = product(a.real, b.imaginary), product(a.imaginary, b.real)
    return Complex(
        lowering.element(node, "sub", rr, ii), lowering.element(node, "add", ri, ir, x=1.0)
    )
