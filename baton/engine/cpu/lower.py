"""Lowering: from a captured graph to levels of row work, matrix products and attention.

Each aten operation is a view (free), row-local arithmetic (micro-operations of rows.h), a matrix
product with a constant, or attention. Any other operation raises CompileError, and the model runs in
torch. layout.py plans the memory afterwards.

After the last attention only the rows that need logits are computed, wherever the model's own code
selects them: rows are independent after this point.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from baton.engine.cpu.capture import LOGIT_ROWS, TOKENS, Captured
from baton.engine.cpu.routers import routers
from baton.engine.cpu.values import (
    At,
    Base,
    Complex,
    Constant,
    Level,
    Lowered,
    Micro,
    Space,
    Value,
    dense,
    loops,
    new_value,
    split_rows,
)
from baton.engine.errors import CompileError

aten = torch.ops.aten
Operand = Value | Constant
MOST_ROUNDS = 256  # of an unrolled loop; with more, row work is slower than torch


def lower(captured: Captured) -> Lowered:
    """All levels of the forward. CompileError if an operation has no lowering."""
    lowering = Lowering(captured)
    for node in captured.graph.nodes:
        lowering.take(node)
    assert lowering.logits is not None
    return Lowered(tuple(lowering.levels), lowering.logits)


class Lowering:
    """Lowers the graph node by node."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.known: dict[Node, Any] = {}  # Value, Constant, number, or a list of them
        self.levels: list[Level] = []
        self.logits: Value | None = None
        self.late = False  # whether the last attention has been lowered
        self.unwritten: dict[Base, list[tuple[Value, Operand]]] = {}
        """Bases that are written in parts, before they are read: each part, and what is copied there."""
        self.routers = routers(captured.graph)
        self._gathered: dict[Value, Value] = {}
        self._inputs = iter(("ids", "positions", "logit_rows"))

    def take(self, node: Node) -> None:
        match node.op:
            case "placeholder":
                self.known[node] = self._input(next(self._inputs))
            case "get_attr":
                self.known[node] = self.captured.constants[str(node.target)]
            case "output":
                result = node.args[0]
                assert isinstance(result, Node)
                self.logits = self._moved(self.known[result])
            case _:
                self.known[node] = self._call(node)

    def _input(self, name: str) -> Value | str:
        if name == "logit_rows":
            return name
        return Value(Base(Space.TOKENS, 1, 0, kind=name), 0, (1,), (0,), 1)

    def _call(self, node: Node) -> Any:
        args = [self._look_up(each) for each in node.args]
        options = {name: self._look_up(each) for name, each in node.kwargs.items()}
        if node.target not in OPERATIONS and not _constant(args):
            raise CompileError(f"it uses the operation {node.target}")
        if _constant(args):
            assert callable(node.target)
            with torch.no_grad():
                return _rowless(node.target(*args, **options))
        return OPERATIONS[node.target](self, node, *args, **options)

    def _look_up(self, given: Any) -> Any:
        if isinstance(given, Node):
            return self._now(self.known[given])
        if isinstance(given, (list, tuple)):
            return [self._look_up(each) for each in given]
        return given

    def _now(self, known: Any) -> Any:
        """The value in the rows that this node needs: after the last attention, the logits rows only."""
        if isinstance(known, list):
            return [self._now(each) for each in known]
        if isinstance(known, Complex):
            return Complex(self._now(known.real), self._now(known.imaginary))
        if not self.late or not isinstance(known, Value) or known.base.space == Space.LOGIT_ROWS:
            return known
        if known not in self._gathered:
            self._gathered[known] = self.gathered(known)
        return self._gathered[known]

    # ---- making values

    def level(self, number: int) -> Level:
        while len(self.levels) <= number:
            self.levels.append(Level())
        return self.levels[number]

    def row_level(self, *inputs: Operand) -> int:
        """The first even level at which all inputs are available."""
        for each in inputs:
            if isinstance(each, Value):
                self.settle(each.base)
        found = [each.base.level for each in inputs if isinstance(each, Value)]
        return max(level + level % 2 for level in found)

    def settle(self, base: Base) -> None:
        """Write the parts of a base that is about to be read, all at one level: that of the last one."""
        parts = self.unwritten.pop(base, None)
        if parts is None:
            return
        if not parts:
            raise CompileError("it reads memory that was never written")
        base.level = level = self.row_level(*(source for _, source in parts))
        for part, source in parts:
            strides = _broadcast(source, part, len(part.shape) + 1)
            self.emit(level, "copy", part, (source, strides))

    def use(self, value: Operand, level: int) -> None:
        if isinstance(value, Value):
            base, _ = value.base.root()
            base.last_use = max(base.last_use, level)
            value.base.last_use = max(value.base.last_use, level)

    def fresh(self, node: Node, level: int) -> Value:
        """A new value of the node's shape."""
        space, axis, shape = split_rows(shape_of(node))
        return new_value(Space.LOGIT_ROWS if self.late else space, shape, axis, level)

    def emit(
        self,
        level: int,
        code: str,
        to: Value,
        *operands: tuple[Operand, tuple[int, ...]],
        x: float = 0.0,
        y: float = 0.0,
    ) -> None:
        """One element-wise micro-operation into `to`, or several if it takes more than two loops.
        Each operand has its strides over the shape of `to`. CompileError beyond MOST_ROUNDS."""
        strides = [to.strides, *(each[1] for each in operands)]
        rounds, (outer, inner), steps = loops(to.shape, *strides)
        if len(rounds) > MOST_ROUNDS:
            raise CompileError(f"a {code} over {to.shape} takes {len(rounds)} loops")
        for extra in rounds:
            at = At(to.base, to.offset + extra[0], *steps[0])
            from_ = [
                At(_home(value), _start(value) + more, *step)
                for (value, _), more, step in zip(operands, extra[1:], steps[1:], strict=True)
            ]
            a, b, c = from_[0], *(*from_[1:], None, None)[:2]
            self.level(level).rows[to.base.space].append(
                Micro(code, outer, inner, at, a, b, c, x=x, y=y)
            )
        for value, _ in operands:
            self.use(value, level)
        self.use(to, level)

    def append(self, level: int, micro: Micro, to: Value, *used: Value) -> None:
        """A micro-operation into `to`, or a part of it, that reads `used`."""
        self.level(level).rows[to.base.space].append(micro)
        for value in (to, *used):
            self.use(value, level)

    def element(
        self, node: Node, code: str, *operands: Operand, x: float = 0.0, y: float = 0.0
    ) -> Value:
        """An element-wise operation with broadcasting."""
        level = self.row_level(*operands)
        to = self.fresh(node, level)
        rank = len(shape_of(node))
        placed = [(each, _broadcast(each, to, rank)) for each in operands]
        self.emit(level, code, to, *placed, x=x, y=y)
        return to

    def _moved(self, value: Value) -> Value:
        """The same numbers, contiguous at the start of a base of their own."""
        if (
            value.contiguous
            and value.offset == 0
            and value.base.width == value.size
            and value.base.parent is None
        ):
            return value
        level = self.row_level(value)
        to = new_value(value.base.space, value.shape, value.axis, level)
        self.emit(level, "copy", to, (value, value.strides))
        return to

    def gathered(self, value: Value) -> Value:
        """The value's logits rows. Another thread may compute them, so a barrier comes first."""
        value = self.together(value)
        self.settle(value.base)
        level = value.base.level + 2 - value.base.level % 2
        to = new_value(Space.LOGIT_ROWS, value.shape, value.axis, level)
        source = At(value.base, value.offset, 0, 1, gathered=True)
        self.level(level).rows[Space.LOGIT_ROWS].append(
            Micro("copy", 1, value.size, At(to.base, 0, 0, 1), source)
        )
        self.use(value, level)
        self.use(to, level)
        return to

    def together(self, value: Value) -> Value:
        """The same numbers, contiguous in some base."""
        return value if value.contiguous else self._moved(value)


def _constant(args: Sequence[Any]) -> bool:
    """Whether no argument depends on the tokens."""
    flat = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
    return not any(isinstance(each, (Value, Complex, str)) for each in flat)


def _rowless(result: Any) -> Any:
    if isinstance(result, torch.Tensor) and {TOKENS, LOGIT_ROWS} & set(result.shape):
        raise CompileError("it computes with the number of tokens")
    return result


def _home(value: Operand) -> Base | Constant:
    return value.base if isinstance(value, Value) else value


def _start(value: Operand) -> int:
    return value.offset if isinstance(value, Value) else 0


def _broadcast(operand: Operand, to: Value, rank: int) -> tuple[int, ...]:
    """The operand's strides over the dimensions of `to`, 0 where it is repeated. Dimensions, the row
    dimension included, are aligned from the last."""
    if isinstance(operand, Value):
        shape, strides = operand.shape, operand.strides
        axis = operand.axis + rank - (len(shape) + 1)
        if axis != to.axis or operand.base.space != to.base.space:
            raise CompileError("it combines different rows of two tensors")
        full = [*shape[: operand.axis], 1, *shape[operand.axis :]]
        steps = [*strides[: operand.axis], 0, *strides[operand.axis :]]
    else:
        full, steps = list(operand.shape), list(dense(tuple(operand.shape)))
    steps = [0 if size == 1 else step for size, step in zip(full, steps, strict=True)]
    steps = [0] * (rank - len(steps)) + steps
    return tuple(steps[: to.axis] + steps[to.axis + 1 :])


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of the node's traced result."""
    return tuple(int(size) for size in node.meta["val"].shape)


Handler = Callable[..., Any]
OPERATIONS: dict[Any, Handler] = {}


def operation(*targets: Any) -> Callable[[Handler], Handler]:
    """Registers the handler of these aten operations (see operations.py and views.py)."""

    def register(handler: Handler) -> Handler:
        for target in targets:
            OPERATIONS[target] = handler
        return handler

    return register
