"""Tries: when a request is tried again, tried apart from others, or given up. Pure.

A worker's death rarely is a request's fault, but a request may kill every worker it comes to. Such a one
is found by the place where its workers die: always the same. So only deaths without progress count.

    deaths at one place     1              tried again at once
                            2, 3           quarantined: tried apart from others that may be at fault
                            4              fails with worker_lost

Progress is a token that reached the router, or a prompt that is filled further than ever before. It ends
the quarantine. A quarantined request is placed when all others on workers have made progress there, and
until it has made progress itself nobody else is placed. Those that run go on. So a request survives any
number of deaths with progress between them, and one that kills its workers takes nobody with it.
"""

from dataclasses import dataclass

QUARANTINE_AFTER = 2
"""Deaths at one place after which a request is tried apart from others."""

MAX_QUARANTINED = 2
"""Further deaths at that place after which it is given up."""

ISOLATION_S = 10.0
"""So long at most others wait for the progress of a request, in case its prompt takes long to fill."""

LOCAL_AFTER = 2
"""Fills that failed or arrived damaged, after which decode fills the prompt itself: no hand-over."""

LOCAL_AFTER_DETOURS = 3
"""The same for fills that were lost on their way. They are no fault of the request, and no try of it; but
so it makes progress however many ways fail."""

MAX_LOCAL = 2
"""Times that even this may fail."""

MAX_GAPS = 4
"""Runs in a row without a token of which some tokens did not arrive."""


@dataclass(slots=True)
class Tries:
    """Of one request. `reached` is the furthest token whose KV was computed, in any of its runs."""

    reached: int = 0
    placed_at: float = 0.0  # when its current run began
    proven: bool = False  # it has made progress since then
    deaths: int = 0  # of workers it was on, since its last progress
    refills: int = 0  # fills that failed or arrived damaged, since its last token
    gaps: int = 0  # since its last token
    detours: int = 0  # fills that were lost on their way, since its last token

    def filled(self, tokens: int) -> None:
        """A prefill worker has computed so many tokens of the prompt."""
        if tokens > self.reached:
            self.reached = tokens
            self.proven = True
            self.deaths = 0

    def emitted(self, length: int) -> None:
        """New tokens came; prompt and tokens are so many now."""
        if length > self.reached:
            self.reached = length - 1
        self.proven = True
        self.deaths = self.refills = self.gaps = self.detours = 0

    @property
    def quarantined(self) -> bool:
        """It is tried apart from others."""
        return self.deaths >= QUARANTINE_AFTER

    @property
    def deadly(self) -> bool:
        """Its workers died too often at this place: it is not tried again."""
        return self.deaths >= QUARANTINE_AFTER + MAX_QUARANTINED

    @property
    def local(self) -> bool:
        """Decode fills the prompt itself from now on."""
        return self.refills >= LOCAL_AFTER or self.detours >= LOCAL_AFTER_DETOURS

    @property
    def unfillable(self) -> bool:
        """Not even decode could fill it."""
        return self.refills >= LOCAL_AFTER + MAX_LOCAL

    @property
    def garbled(self) -> bool:
        """Its tokens do not reach the router."""
        return self.gaps >= MAX_GAPS


class Isolation:
    """The placed requests without progress on their workers, and those among them that are quarantined:
    only these decide who waits for whom."""

    def __init__(self) -> None:
        self._unproven: dict[str, Tries] = {}  # in the order in which they were placed
        self._quarantined: dict[str, Tries] = {}

    def placed(self, name: str, tries: Tries, now: float) -> None:
        """Its next run begins."""
        tries.placed_at, tries.proven = now, False
        self._unproven[name] = tries
        if tries.quarantined:
            self._quarantined[name] = tries

    def tried(self, name: str, tries: Tries) -> None:
        """It may have made progress."""
        if tries.proven and name in self._unproven:
            self.left(name)

    def left(self, name: str) -> None:
        """It is on no worker any more."""
        self._unproven.pop(name, None)
        self._quarantined.pop(name, None)

    @property
    def any_quarantined(self) -> bool:
        """A quarantined request is on a worker."""
        return bool(self._quarantined)

    def wait_s(self, tries: Tries, now: float) -> float:
        """Seconds that a queued request still waits for the progress of others, if they make none; 0: it
        waits for nobody."""
        placed = [each.placed_at for each in self._quarantined.values()]
        if tries.quarantined and self._unproven:
            placed.append(next(reversed(self._unproven.values())).placed_at)
        return max([0.0, *(at + ISOLATION_S - now for at in placed)])
