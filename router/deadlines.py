"""Deadlines: until when a request may wait for a worker, and until when it may take. Pure.

The first ends with the first grant of blocks, and begins anew when the request lost its worker: nobody
waits for ever. A router that is otherwise idle wakes up for a deadline (Router.due).
"""

from math import inf

from router.priority import PriorityQueue


class Deadlines:
    """Of all live requests. The ledger keeps them with its states."""

    def __init__(self) -> None:
        self._waits = PriorityQueue()  # until placed
        self._ends = PriorityQueue()

    def ends(self, name: str, timeout_s: float, now: float) -> None:
        """The request must end within this time, if it is not 0."""
        if timeout_s > 0:
            self._ends.put(name, now + timeout_s)

    def waits(self, name: str, timeout_s: float, now: float) -> None:
        """The request waits for a worker, so long at most, if it is not 0. Does nothing if its time
        already runs."""
        if timeout_s > 0 and name not in self._waits:
            self._waits.put(name, now + timeout_s)

    def placed(self, name: str) -> None:
        """A worker has taken the request."""
        self._waits.remove(name)

    def ended(self, name: str) -> None:
        """The request is over."""
        self._waits.remove(name)
        self._ends.remove(name)

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
