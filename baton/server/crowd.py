"""Crowd: whose connections are open, and what happens to one more than may be. Pure.

    crowd.came(member)                        it has a place now, or is `refused`
    crowd.works(member), crowd.rests(member)  within a request and its response, or between two
    crowd.left(member)

An address may hold a multiple of what is free, as a tenant may in admission.py: one that is alone gets
nearly all places, and there is always one for others. (Keys come later, with the head of a request.)
Where an address has its share, the connection of it that rested longest gives way to a new one, but not
one that has just come: its request is on its way. If none can give way, the new one is refused. Refused
ones are counted apart, and few of them wait for the answer that says so; and so are those that gave way
and whose last bytes, or whose client's farewell (TLS), take their time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from baton.clock import Clock, monotonic
from baton.server.admission import QUEUE_SHARE, Shares

CONNECTIONS = 2048
REFUSED = 64
"""Connections that are open only to be told that they have no place; and as many that gave way."""

FRESH_S = 2.0
"""After its arrival a connection has so long for its first request, before it may give way."""


def places(descriptors: int, reserve: int) -> tuple[int, int]:
    """How many connections may be open, and how many beside them, of those that are refused and again of
    those that gave way, in a process that may open `descriptors` more files and keeps `reserve` of them;
    negative: no limit."""
    if descriptors < 0:
        return CONNECTIONS, REFUSED
    room = max(descriptors - reserve, 3)
    refused = min(REFUSED, room // 8 or 1)
    return min(CONNECTIONS, room - 2 * refused), refused


@dataclass(eq=False, slots=True)
class Member:
    """One connection. `close` ends it after what is left to be sent, `reset` at once."""

    address: str
    close: Callable[[], None]
    reset: Callable[[], None]
    refused: bool = field(default=False, init=False)
    leaves: bool = field(default=False, init=False)  # it gave way to another
    asked: bool = field(default=False, init=False)  # at least one request has begun
    since: float = field(default=0.0, init=False)  # when it came, or when its last request ended


class Crowd:
    """All connections of a server."""

    def __init__(
        self, limit: int = CONNECTIONS, refused: int = REFUSED, clock: Clock = monotonic
    ) -> None:
        self._shares = Shares(limit, QUEUE_SHARE)
        self._most_refused = refused
        self._clock = clock
        # By address, the longest first; new ones have asked nothing yet.
        self._resting: dict[str, dict[Member, None]] = {}
        self._new: dict[str, dict[Member, None]] = {}
        self._refused: dict[Member, None] = {}
        self._leaving: dict[Member, None] = {}

    @property
    def limit(self) -> int:
        return self._shares.limit

    def came(self, member: Member) -> None:
        """A new connection. It rests, or is refused; others may be closed for it."""
        address = member.address
        if not self._shares.within_share(address, 1) and not self._make_room(address):
            member.refused = True
            self._refused[member] = None
            self._keep_few(self._refused)
            return
        self._shares.change(address, 1)
        self.rests(member)

    def rests(self, member: Member) -> None:
        """It waits for a request. Does nothing if it does so already."""
        if member.refused or member.leaves:
            return
        waiting = self._waiting(member).setdefault(member.address, {})
        if member not in waiting:
            member.since = self._clock()
            waiting[member] = None

    def works(self, member: Member) -> None:
        """A request has begun."""
        self._rests_no_more(member)
        member.asked = True

    def left(self, member: Member) -> None:
        """It has ended. Called once for each."""
        self._rests_no_more(member)
        if member.refused:
            self._refused.pop(member, None)
        elif member.leaves:
            self._leaving.pop(member, None)
        else:
            self._shares.change(member.address, -1)

    def _make_room(self, address: str) -> bool:
        """Close a connection of this address; of the one that holds the most, if this one holds none."""
        addresses = [address]
        if not self._shares.held(address):
            addresses = sorted({*self._resting, *self._new}, key=self._shares.held, reverse=True)
        for each in addresses:
            if (found := self._rested_longest(each)) is not None:
                self._gives_way(found)
                return True
        return False

    def _gives_way(self, member: Member) -> None:
        self._rests_no_more(member)
        member.leaves = True
        self._shares.change(member.address, -1)
        self._leaving[member] = None
        member.close()
        self._keep_few(self._leaving)

    def _keep_few(self, beside: dict[Member, None]) -> None:
        if len(beside) > self._most_refused:
            first = next(iter(beside))
            del beside[first]
            first.reset()

    def _rested_longest(self, address: str) -> Member | None:
        """Of those of this address that may give way."""
        latest = self._clock() - FRESH_S
        found = [*islice(self._resting.get(address, ()), 1)]
        found += [each for each in islice(self._new.get(address, ()), 1) if each.since <= latest]
        return min(found, key=lambda each: each.since, default=None)

    def _waiting(self, member: Member) -> dict[str, dict[Member, None]]:
        return self._resting if member.asked else self._new

    def _rests_no_more(self, member: Member) -> None:
        waiting = self._waiting(member)
        own = waiting.get(member.address, {})
        own.pop(member, None)
        if not own:
            waiting.pop(member.address, None)
