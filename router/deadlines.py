"""Deadlines: until when a request may wait for a worker, and until when it may take. Pure.

The first ends with the first grant of blocks, and begins anew when the request lost its worker: nobody
waits for ever. A router that is otherwise idle wakes up for a deadline (Router.due).
"""

from math import inf

from router.ledger import Entry
from router.priority import PriorityQueue


class Deadlines:
    """Of all live requests, the earliest first."""

    def __init__(self) -> None:
        self._waits = PriorityQueue()  # until placed
        self._ends = PriorityQueue()

    def submitted(self, entry: Entry, now: float) -> None:
        """Both times begin."""
        self.waits(entry, now)
        if entry.timeout_s > 0:
            self._ends.put(entry.id, now + entry.timeout_s)

    def waits(self, entry: Entry, now: float) -> None:
        """The request waits for a worker, from now on. Does nothing if its time already runs."""
        if entry.queue_timeout_s > 0 and entry.id not in self._waits:
            self._waits.put(entry.id, now + entry.queue_timeout_s)

    def placed(self, entry: Entry) -> None:
        """A worker has taken the request."""
        self._waits.remove(entry.id)

    def ended(self, entry: Entry) -> None:
        """The request is over."""
        self._waits.remove(entry.id)
        self._ends.remove(entry.id)

    def late_to_end(self, now: float) -> str | None:
        """A request that should have ended by now."""
        return _late(self._ends, now)

    def late_to_start(self, now: float) -> str | None:
        """A request that should have been placed by now."""
        return _late(self._waits, now)

    def due(self, now: float) -> float:
        """Seconds to the next deadline."""
        found = [each for each in (self._waits.first(), self._ends.first()) if each is not None]
        return min((at for _, at in found), default=inf) - now


def _late(queue: PriorityQueue, now: float) -> str | None:
    first = queue.first()
    return first[0] if first is not None and first[1] <= now else None
