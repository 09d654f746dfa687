"""Work: what a lowered forward is made of. Levels stand one after the other, a barrier between them."""

from dataclasses import dataclass, field

import torch

from baton.engine.cpu.values import Base, Space, Value

Constant = torch.Tensor


@dataclass(frozen=True, slots=True)
class At:
    """Where a micro-operation finds or leaves its numbers (Operand of rows.h)."""

    where: Base | Constant
    offset: int
    outer_stride: int
    inner_stride: int
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class Micro:
    """One micro-operation (Op of rows.h)."""

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
    """Rows times a constant [K, N], plus a bias [N]."""

    rows: Value
    weight: Constant
    bias: Constant | None
    to: Base


@dataclass(eq=False, slots=True)
class Attend:
    """One layer's attention: key and value into the pool, then query over it."""

    layer: int
    query: Value
    key: Value
    value: Value
    to: Base


@dataclass(slots=True)
class Level:
    """What happens between two barriers."""

    rows: dict[Space, list[Micro]] = field(default_factory=lambda: {space: [] for space in Space})
    products: list[Product] = field(default_factory=list)
    attends: list[Attend] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lowered:
    """Levels in order, and the value that holds the logits."""

    levels: tuple[Level, ...]
    logits: Value
