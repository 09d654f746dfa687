"""Plans the memory of a lowered forward: which values share space, and which products are merged.

A value lives from the level that computes it to the last level that reads it. Values that are used
in one level only stay in a thread's scratch memory. Products of the same rows (query, key and value;
gate and up) become one product with concatenated weights; those that are never quantized keep apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from baton.engine.cpu.fuse import fuse
from baton.engine.cpu.values import At, Attend, Base, Grouped, Level, Lowered, Micro, Space, Value

GRAIN = 16  # floats: rows are aligned to vectors


@dataclass(frozen=True, slots=True)
class Merged:
    """Products of the same rows as one: rows @ [concatenated weights] + biases."""

    rows: Value
    weights: tuple[torch.Tensor, ...]  # [K, N_i]
    biases: tuple[torch.Tensor | None, ...]
    to: Base
    exact: bool = False  # its weights are never quantized


@dataclass(frozen=True, slots=True)
class RowWork:
    """Row-local operations over the rows of one space."""

    space: Space
    micros: tuple[Micro, ...]


Step = RowWork | Merged | Grouped | Attend


@dataclass(slots=True)
class MemoryPlan:
    """Steps in order; where each arena value begins (floats, per row of its space) and the sizes."""

    steps: list[Step] = field(default_factory=list)
    starts: dict[Base, int] = field(default_factory=dict)  # roots in the arena
    scratch: dict[Base, int] = field(default_factory=dict)
    floats: dict[Space, int] = field(default_factory=dict)
    scratch_floats: int = 0


def lay_out(lowered: Lowered) -> MemoryPlan:
    """The steps of the forward, and the offset of every value."""
    plan = MemoryPlan()
    lowered.logits.base.kind = "logits"
    lowered.logits.base.last_use = len(lowered.levels)
    for level in lowered.levels:
        plan.steps += _steps(level)
    spans: dict[Space, list[tuple[Base, int, int]]] = {space: [] for space in Space}
    for step in plan.steps:
        if isinstance(step, RowWork):
            _place_scratch(step, plan)
            made = dict.fromkeys(_root(micro.to) for micro in step.micros)
        else:
            made = dict.fromkeys([step.to.root()[0]])
        for base in made:
            if base.kind == "arena" and base not in plan.scratch:
                spans[base.space].append((base, base.level, base.last_use))
    for space, wanted in spans.items():
        places, plan.floats[space] = pack_spans(wanted)
        plan.starts |= places
    return plan


def pack_spans(wanted: Iterable[tuple[Base, int, int]]) -> tuple[dict[Base, int], int]:
    """First-fit allocation of (base, first, last): bases whose inclusive spans overlap do not share
    space. Returns offsets and the total, in floats."""
    places: dict[Base, int] = {}
    taken: list[tuple[int, int, int, int]] = []  # begin, end, first, last
    for base, first, last in sorted(wanted, key=lambda each: (each[1], -each[0].width)):
        width = -(-base.width // GRAIN) * GRAIN
        begin = 0
        for other_begin, other_end, other_first, other_last in sorted(taken):
            if other_last < first or other_first > last:
                continue
            if begin + width <= other_begin:
                break
            begin = max(begin, other_end)
        places[base] = begin
        taken.append((begin, begin + width, first, last))
    return places, max((end for _, end, _, _ in taken), default=0)


def _steps(level: Level) -> list[Step]:
    steps: list[Step] = [
        RowWork(space, fuse(micros)) for space, micros in level.rows.items() if micros
    ]
    groups: dict[tuple[Base, int, Space, bool], list[int]] = {}
    for i, product in enumerate(level.products):
        base, offset = product.rows.base.root()
        alike = base, offset + product.rows.offset, product.to.space, product.exact
        groups.setdefault(alike, []).append(i)
    for members in groups.values():
        products = [level.products[i] for i in members]
        to = products[0].to
        if len(products) > 1:
            to = Base(to.space, 0, to.level)
            for product in products:
                product.to.parent, product.to.offset = to, to.width
                to.width += product.to.width
                to.last_use = max(to.last_use, product.to.last_use)
        first = products[0]
        weights, biases = tuple(p.weight for p in products), tuple(p.bias for p in products)
        steps.append(Merged(first.rows, weights, biases, to, first.exact))
    return steps + list(level.grouped) + list(level.attends)


def _root(at: At) -> Base:
    assert isinstance(at.where, Base)
    return at.where.root()[0]


def _place_scratch(work: RowWork, plan: MemoryPlan) -> None:
    """Offsets in scratch memory of the values that only this step uses."""
    spans: dict[Base, tuple[int, int]] = {}
    for i, micro in enumerate(work.micros):
        for at in (micro.to, micro.a, micro.b, micro.c):
            if at is None or not isinstance(at.where, Base):
                continue
            base = _root(at)
            if base.kind == "arena" and base.level == base.last_use:
                first, _ = spans.get(base, (i, i))
                spans[base] = (first, i)
    places, floats = pack_spans((base, *span) for base, span in spans.items())
    plan.scratch |= places
    plan.scratch_floats = max(plan.scratch_floats, floats)
