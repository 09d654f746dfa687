"""Crowd: whose connections are open, and what happens to one more than may be. Pure.

    crowd.came(member)                        it has a place now, or is `refused`
    crowd.works(member), crowd.rests(member)  within a request and its response, or between two
    crowd.left(member)

An address may hold a multiple of what is free, as a tenant may in admission.py: one that is alone gets
nearly all places, and there is always one for others. (Keys come later, with the head of a request.)
Where an address has its share, the connection of it that rested longest gives way to a new one. If all of
them work, the new one is refused. Refused ones are counted apart, and few of them wait for the answer
that says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.server.admission import QUEUE_SHARE, Shares

CONNECTIONS = 2048
REFUSED = 64
"""Connections that are open only to be told that they have no place."""


def places(descriptors: int, reserve: int) -> tuple[int, int]:
    """How many connections may be open, and how many refused ones beside them, in a process that may open
    `descriptors` more files and keeps `reserve` of them; negative: no limit."""
    if descriptors < 0:
        return CONNECTIONS, REFUSED
    room = max(descriptors - reserve, 2)
    refused = min(REFUSED, room // 4 or 1)
    return min(CONNECTIONS, room - refused), refused


@dataclass(eq=False, slots=True)
class Member:
    """One connection. `close` ends it after what is left to be sent, `reset` at once."""

    address: str
    close: Callable[[], None]
    reset: Callable[[], None]
    refused: bool = field(default=False, init=False)


class Crowd:
    """All connections of a server."""

    def __init__(self, limit: int = CONNECTIONS, refused: int = REFUSED) -> None:
        self._shares = Shares(limit, QUEUE_SHARE)
        self._most_refused = refused
        self._resting: dict[str, dict[Member, None]] = {}  # by address, the longest first
        self._refused: dict[Member, None] = {}

    @property
    def limit(self) -> int:
        return self._shares.limit

    def came(self, member: Member) -> None:
        """A new connection. It rests, or is refused; others may be closed for it."""
        address = member.address
        if not self._shares.within_share(address, 1) and not self._make_room(address):
            member.refused = True
            self._refused[member] = None
            if len(self._refused) > self._most_refused:
                first = next(iter(self._refused))
                del self._refused[first]
                first.reset()
            return
        self._shares.change(address, 1)
        self.rests(member)

    def rests(self, member: Member) -> None:
        """It waits for a request. Does nothing if it does so already."""
        if not member.refused:
            self._resting.setdefault(member.address, {}).setdefault(member)

    def works(self, member: Member) -> None:
        """A request has begun."""
        resting = self._resting.get(member.address, {})
        resting.pop(member, None)
        if not resting:
            self._resting.pop(member.address, None)

    def left(self, member: Member) -> None:
        """It has ended. Called once for each."""
        self.works(member)
        if member.refused:
            self._refused.pop(member, None)
        else:
            self._shares.change(member.address, -1)

    def _make_room(self, address: str) -> bool:
        """Close a connection of this address; of the one that holds the most, if this one holds none."""
        if not self._shares.held(address) and self._resting:
            address = max(self._resting, key=self._shares.held)
        for found in self._resting.get(address, ()):
            self.works(found)
            found.close()
            return True
        return False
