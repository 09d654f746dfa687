"""Ways: which (prefill, decode) pairs are down, and when to ask for another try. Pure.

    open -- a push fails, or KV that was sent does not arrive --> down
    down -- after 0.5, 1, 2, 4 ... 10 s ---------------------> asked
    asked -- Attached --> open            asked -- AttachFailed --> down

A way that was open for STEADY_S begins anew with the shortest time. One that attaches and loses what is
sent again and again (large packets do not pass, a link flaps) is used more and more rarely. Attaching
costs its prefill worker no time: a thread does it. What is open stands in Member.attached, what is not in
Member.failed (workers.py).
"""

from dataclasses import dataclass
from math import inf

FIRST_S, MOST_S = 0.5, 10.0
STEADY_S = 15.0
"""More than MOST_S: a way that flaps does not begin anew by holding between two of its failures."""


@dataclass(slots=True)
class Way:
    """One way that has failed. `again`: when to ask; inf: it was asked, or is open."""

    wait_s: float
    again: float
    opened: float | None = None


class Ways:
    """Of all pairs. Those that never failed take no memory."""

    def __init__(self) -> None:
        self._ways: dict[tuple[str, str], Way] = {}
        self._down: set[tuple[str, str]] = set()
        self._next = inf  # no way is due before

    def failed(self, prefill: str, decode: str, now: float) -> float:
        """Seconds until it is to be tried again."""
        way = self._ways.get((prefill, decode))
        if way is None or _steady(way, now):
            wait = FIRST_S
        elif way.again < inf:
            return way.again - now  # the same failure, told by the other end
        else:
            wait = min(2 * way.wait_s, MOST_S)
        self._ways[prefill, decode] = Way(wait, now + wait)
        self._down.add((prefill, decode))
        self._next = min(self._next, now + wait)
        return wait

    def opened(self, prefill: str, decode: str, now: float) -> bool:
        """It was attached. True: after a failure."""
        way = self._ways.get((prefill, decode))
        if way is None:
            return False
        back = way.opened is None
        self._down.discard((prefill, decode))
        way.again, way.opened = inf, now
        return back

    @property
    def any_down(self) -> bool:
        """Whether a way has failed and is not open again."""
        return bool(self._down)

    def due(self, now: float) -> float:
        """Seconds until a way is to be tried again."""
        return self._next - now

    def to_try(self, now: float) -> list[tuple[str, str]]:
        """The ways that are to be tried now. Each is named once for each failure."""
        if now < self._next:
            return []
        self._ways = {pair: way for pair, way in self._ways.items() if not _steady(way, now)}
        found = [pair for pair, way in self._ways.items() if way.again <= now]
        for pair in found:
            self._ways[pair].again = inf
        self._next = min((way.again for way in self._ways.values()), default=inf)
        return found

    def again_in(self, prefill: str, decode: str, now: float) -> float | None:
        """Seconds until it is tried again; None if it is being tried, or is open."""
        way = self._ways.get((prefill, decode))
        return None if way is None or way.again == inf else max(0.0, way.again - now)

    def forget(self, worker: str) -> None:
        """The worker is gone, or has begun anew."""
        if any(worker in pair for pair in self._ways):
            self._ways = {pair: way for pair, way in self._ways.items() if worker not in pair}
            self._down &= self._ways.keys()

    def __len__(self) -> int:
        return len(self._ways)


def _steady(way: Way, now: float) -> bool:
    return way.opened is not None and now - way.opened >= STEADY_S
