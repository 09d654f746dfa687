"""Operations that write into memory which other tensors of the model share.

The traced graph reads the result of `x += y`, so mostly it is `x + y`. Where the memory is read again
under another name (`x[1:] += y`, and then x), the whole run gets a new version, and all its names move
there.
"""

import operator
from typing import Any

from torch.fx import Node

from baton.engine.cpu.lower import Lowering
from baton.engine.cpu.values import Base, Space, Value, new_value
from baton.engine.cpu.views import VIEWS
from baton.engine.errors import CompileError


def is_read_under_another_name(node: Node) -> bool:
    """Whether the node writes in place, and a tensor that shares the memory is read afterwards."""
    return bool(_read_later(node))


def written(lowering: Lowering, node: Node, result: Any) -> Any:
    """What an operation in place returns, whose result has been computed apart."""
    names = _read_later(node)
    if not names:
        return result
    target = node.args[0]
    assert isinstance(target, Node)
    part = lowering.known[target]
    if not all(_on(part, lowering.known[name]) for name in names):
        raise CompileError(f"it reads a tensor again after {node.target}")
    whole = _whole(lowering, part.base)
    level = lowering.row_level(whole, result)
    new = new_value(whole.base.space, whole.shape, 0, level)
    lowering.emit(level, "copy", new, (whole, whole.strides))
    for name in names:
        lowering.known[name] = _moved(lowering.known[name], new.base)
    to: Value = _moved(part, new.base)
    if to.axis != result.axis:
        raise CompileError(f"it moves rows in {node.target}")
    lowering.emit(level, "copy", to, (result, result.strides))
    return to


def _on(part: Any, known: Any) -> bool:
    """Whether a value, or each of a list of parts, lies on the same base."""
    if isinstance(known, list):
        return all(_on(part, each) for each in known)
    return isinstance(known, Value) and known.base is part.base


def _moved(known: Any, base: Base) -> Any:
    """The same part, or parts, of the new version."""
    if isinstance(known, list):
        return [_moved(each, base) for each in known]
    return Value(base, known.offset, known.shape, known.strides, known.axis)


def _whole(lowering: Lowering, base: Base) -> Value:
    """All numbers of a base; behind the last attention those of the logits rows."""
    if base.kind != "arena":
        raise CompileError("it writes into its input")
    lowering.settle(base)
    whole = Value(base, 0, (base.width,), (1,), 0)
    late = lowering.late and base.space != Space.LOGIT_ROWS
    return lowering.gathered(whole) if late else whole


def _read_later(node: Node) -> set[Node]:
    """If the node writes in place: the other names of the memory that are read after it."""
    if not _writes(node):
        return set()
    root = node.args[0]
    while isinstance(root, Node) and _shares(root):
        root = root.args[0]
    assert isinstance(root, Node)
    names, read, after = {root}, set(), False
    for each in node.graph.nodes:
        if after:
            read |= names.intersection(each.all_input_nodes)
        elif each is node:
            after = True
        elif _shares(each) and each.args[0] in names:
            names.add(each)
    return read


def _writes(node: Node) -> bool:
    """Whether it is an operation such as aten.add_.Tensor."""
    return str(node.target).partition(".")[2].partition(".")[0].endswith("_")


def _shares(node: Node) -> bool:
    """Whether the result has the memory of the first argument. A result of topk has its own."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and source.target in VIEWS
    return node.target in VIEWS or (node.op == "call_function" and _writes(node))
