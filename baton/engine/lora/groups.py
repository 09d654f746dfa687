"""Which tokens of a forward belong to which adapter. Pure: rows in, places out.

    rows       A of sql: 3 tokens     B of none: 1     C of law: 1     D of sql: 1
    tokens     sql: 0 1 2 5           law: 4
    logits     sql: 0 3               law: 2           one line for each of the rows (Logits.LAST)

The rows of one adapter form one product, wherever they stand in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.kv.row import Logits, Row


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one adapter in a packed forward: places among its tokens, and among its lines of
    logits, which only the lm_head sees."""

    adapter: str  # digest
    tokens: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Grouped:
    """The groups of a forward, in the order in which they first occur, and its size."""

    groups: tuple[Group, ...]
    tokens: int
    logits: int


def span(places: Sequence[int]) -> slice | None:
    """Ascending places that stand side by side, as a slice: they need no copies. None for others."""
    if places and places[-1] - places[0] != len(places) - 1:
        return None
    return slice(places[0], places[-1] + 1) if places else slice(0, 0)


def grouped(rows: Sequence[Row]) -> Grouped:
    """The groups of these rows, packed in their order. Rows without an adapter are in none of them."""
    groups: dict[str, Group] = {}
    tokens = logits = 0
    for row in rows:
        count = len(row.token_ids)
        lines = count if row.logits is Logits.ALL else int(row.logits is Logits.LAST)
        if row.adapter:
            group = groups.setdefault(row.adapter, Group(row.adapter))
            group.tokens.extend(range(tokens, tokens + count))
            group.logits.extend(range(logits, logits + lines))
        tokens, logits = tokens + count, logits + lines
    return Grouped(tuple(groups.values()), tokens, logits)
