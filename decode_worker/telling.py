"""Telling: the router hears of the pool when it changes, but not at every step."""

from baton.kv.blocks import BlockTable
from baton.wire.messages import Pool

TELL_S = 0.25


class Teller:
    """What was told last, and when something may be told again."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._told: Pool | None = None
        self._next = 0.0

    def forget(self) -> None:
        """The next router knows nothing."""
        self._told = None

    def due(self, now: float) -> float:
        """Seconds until there is something to tell."""
        return float("inf") if self._pool() == self._told else max(0.0, self._next - now)

    def news(self, now: float) -> Pool | None:
        """To be told now, if anything."""
        pool = self._pool()
        if pool == self._told or now < self._next:
            return None
        self._told, self._next = pool, now + TELL_S
        return pool

    def _pool(self) -> Pool:
        table = self._table
        return Pool(table.free_blocks, table.cached_blocks, table.quarantined_blocks)
