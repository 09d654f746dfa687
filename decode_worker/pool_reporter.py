"""PoolReporter: reports the KV pool's statistics to the router when they change, at most a few times a
second. They ride on other messages, because on a CPU an extra message slows the decode step."""

from baton.kv.blocks import BlockTable
from baton.wire.messages import PoolStats

INTERVAL_S, ALONE_INTERVAL_S = 0.25, 1.0


class PoolReporter:
    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._sent: PoolStats | None = None
        self._sent_at = -ALONE_INTERVAL_S

    def forget(self) -> None:
        """A new router needs a report even if nothing changed."""
        self._sent = None

    def due(self, now: float) -> float:
        """Seconds until an idle worker has something to report."""
        if self._stats() == self._sent:
            return float("inf")
        return max(0.0, self._sent_at + INTERVAL_S - now)

    def report(self, now: float, *, alone: bool) -> PoolStats | None:
        """The report to send now, if one is due. `alone`: no other message goes out, and runs decode."""
        if now < self._sent_at + (ALONE_INTERVAL_S if alone else INTERVAL_S):
            return None
        if (stats := self._stats()) == self._sent:
            return None
        self._sent, self._sent_at = stats, now
        return stats

    def _stats(self) -> PoolStats:
        table = self._table
        return PoolStats(table.free_blocks, table.cached_blocks, table.quarantined_blocks)
