"""Telling: the router hears of the pool when it changes, but not at every step. On a CPU a message costs
the decode step beside it some time: so news goes along with other messages, or waits for longer."""

from baton.kv.blocks import BlockTable
from baton.wire.messages import Pool

TELL_S, ALONE_S = 0.25, 1.0


class Teller:
    """What was told last, and when something may be told again."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._told: Pool | None = None
        self._last = -ALONE_S

    def forget(self) -> None:
        """The next router knows nothing."""
        self._told = None

    def due(self, now: float) -> float:
        """Seconds until an idle worker has something to tell."""
        if self._pool() == self._told:
            return float("inf")
        return max(0.0, self._last + TELL_S - now)

    def news(self, now: float, *, busy: bool) -> Pool | None:
        """To be told now, if anything. `busy`: it would go alone, and a forward is to come."""
        if now < self._last + (ALONE_S if busy else TELL_S) or (pool := self._pool()) == self._told:
            return None
        self._told, self._last = pool, now
        return pool

    def _pool(self) -> Pool:
        table = self._table
        return Pool(table.free_blocks, table.cached_blocks, table.quarantined_blocks)
