"""Lowering: a captured graph to stages of row work, matrix products and attention.

Each aten operation is one of: a view (free), row-local arithmetic (micro-operations of rows.h), a
matrix product with a constant, attention. Anything else is refused, and the model runs in torch.
Memory is planned later, in layout.py.

After the last attention only the rows that need logits are computed, wherever the model's own code
selects them: rows are independent after this point.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from baton.engine.cpu.capture import LOGIT_ROWS, TOKENS, Captured
from baton.engine.cpu.values import Base, Space, Value, dense, loops, split_rows
from baton.engine.cpu.work import At, Constant, Level, Lowered, Micro
from baton.engine.errors import CompileError

aten = torch.ops.aten
Operand = Value | Constant
MOST_ROUNDS = 256  # of an unrolled loop: beyond that, row work is slower than torch


def lower(captured: Captured) -> Lowered:
    """All stages of the forward. CompileError if there is no lowering for an operation."""
    lowering = Lowering(captured)
    for node in captured.graph.nodes:
        lowering.take(node)
    assert lowering.logits is not None
    return Lowered(tuple(lowering.levels), lowering.logits)


class Lowering:
    """Follows the graph node by node."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.known: dict[Node, Any] = {}  # Value, Constant, number, or a list of them
        self.levels: list[Level] = []
        self.logits: Value | None = None
        self.late = False  # whether the last attention has been lowered
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
            raise CompileError(f"it uses {node.target}")
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
        """The value where this node needs it: after the last attention, of the logits rows alone."""
        if isinstance(known, list):
            return [self._now(each) for each in known]
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
        """The first even level at which all of these are computed."""
        found = [each.base.level for each in inputs if isinstance(each, Value)]
        return max(level + level % 2 for level in found)

    def use(self, value: Operand, level: int) -> None:
        if isinstance(value, Value):
            base, _ = value.base.root()
            base.last_use = max(base.last_use, level)
            value.base.last_use = max(value.base.last_use, level)

    def fresh(self, node: Node, level: int) -> Value:
        """A new value of the node's shape."""
        space, axis, shape = split_rows(shape_of(node))
        space = Space.LOGIT_ROWS if self.late else space
        size = 1
        for each in shape:
            size *= each
        return Value(Base(space, size, level), 0, shape, dense(shape), axis)

    def emit(
        self,
        level: int,
        code: str,
        to: Value,
        *operands: tuple[Operand, tuple[int, ...]],
        x: float = 0.0,
        y: float = 0.0,
    ) -> None:
        """One element-wise micro-operation into `to` (several, if it takes more than two loops).
        Operands come with their strides over to's shape."""
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
            a, b = from_[0], from_[1] if len(from_) > 1 else None
            self.level(level).rows[to.base.space].append(
                Micro(code, outer, inner, at, a, b, x=x, y=y)
            )
        for value, _ in operands:
            self.use(value, level)
        self.use(to, level)

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
        """The same numbers, contiguous from the beginning of a base of their own."""
        if (
            value.contiguous
            and value.offset == 0
            and value.base.width == value.size
            and value.base.parent is None
        ):
            return value
        level = self.row_level(value)
        to = Value(
            Base(value.base.space, value.size, level),
            0,
            value.shape,
            dense(value.shape),
            value.axis,
        )
        self.emit(level, "copy", to, (value, value.strides))
        return to

    def gathered(self, value: Value) -> Value:
        """The value's logits rows. They may be among another thread's rows, so a barrier comes first."""
        value = self.together(value)
        level = value.base.level + 2 - value.base.level % 2
        base = Base(Space.LOGIT_ROWS, value.size, level)
        to = Value(base, 0, value.shape, dense(value.shape), value.axis)
        source = At(value.base, value.offset, 0, 1, gathered=True)
        self.level(level).rows[Space.LOGIT_ROWS].append(
            Micro("copy", 1, value.size, At(base, 0, 0, 1), source)
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
    return not any(isinstance(each, (Value, str)) for each in flat)


def _rowless(result: Any) -> Any:
    if isinstance(result, torch.Tensor) and {TOKENS, LOGIT_ROWS} & set(result.shape):
        raise CompileError("it counts the tokens of a forward")
    return result


def _home(value: Operand) -> Base | Constant:
    return value.base if isinstance(value, Value) else value


def _start(value: Operand) -> int:
    return value.offset if isinstance(value, Value) else 0


def _broadcast(operand: Operand, to: Value, rank: int) -> tuple[int, ...]:
    """The operand's strides over `to`'s dimensions, 0 where it is repeated. Dimensions are matched
    from the last, the row dimension (at to.axis) among them."""
    if isinstance(operand, Value):
        shape, strides = operand.shape, operand.strides
        axis = operand.axis + rank - (len(shape) + 1)
        if axis != to.axis or operand.base.space != to.base.space:
            raise CompileError("rows of one tensor meet other rows of another")
        full = [*shape[: operand.axis], 1, *shape[operand.axis :]]
        steps = [*strides[: operand.axis], 0, *strides[operand.axis :]]
    else:
        full, steps = list(operand.shape), list(dense(tuple(operand.shape)))
    steps = [0 if size == 1 else step for size, step in zip(full, steps, strict=True)]
    steps = [0] * (rank - len(steps)) + steps
    return tuple(steps[: to.axis] + steps[to.axis + 1 :])


def shape_of(node: Node) -> tuple[int, ...]:
    """Of the node's traced result."""
    return tuple(int(size) for size in node.meta["val"].shape)


Handler = Callable[..., Any]
OPERATIONS: dict[Any, Handler] = {}


def operation(*targets: Any) -> Callable[[Handler], Handler]:
    """Registers how these aten operations are lowered (see operations.py)."""

    def register(handler: Handler) -> Handler:
        for target in targets:
            OPERATIONS[target] = handler
        return handler

    return register
