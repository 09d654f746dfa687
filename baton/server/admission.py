"""Admission: who may wait here, and how much. Pure: counts in, a ticket or a refusal out.

    admission.check(tenant, choices)              raises ApiError: 503, or 400 if it can never fit
    ticket = admission.take(tenant, choices)      the same, and takes the places
    ticket.moved_up()                             a choice has its first token, or has ended
    ticket.close()                                the request is over

    body = bodies.body(tenant)
    body.add(size)                                bytes have arrived; raises ApiError: 503
    body.close()                                  it has become a request, or was refused

Of a request's choices (n answers to each prompt) a *window* waits at the router; the others wait in the
request's own *line* here and follow as those before them get their first token. So a request of thousands
takes no more places at the router than a small one. Lines have a bound of their own.

A tenant may hold a multiple of what is left free for everybody (dynamic thresholds, Choudhury and Hahne
1998): one that is alone gets nearly all places, several get equal parts, and there is always room for one
more.
"""

from collections import Counter

from baton.server.api_error import ApiError

GROUP_WINDOW = 16
QUEUE_SHARE = 8
"""Times the free places a tenant may hold: alone 8/9 of all."""
LINE_SHARE = 1
LINE_FACTOR = 32
"""Places in lines for each place at the router."""
MOST_BODY_BYTES = 256 << 20
"""Of all bodies that have not become requests yet ..."""
ALLOWANCE = 64 << 10
"""... not counting the first bytes of each: large bodies keep no request of the usual size out."""
RETRY_S = 2


class Shares:
    """What tenants hold of `limit`. One of them gets at most `share` times what is free."""

    def __init__(self, limit: int, share: int) -> None:
        self.limit, self.share = limit, share
        self.total = 0
        self._held = Counter[str]()

    def held(self, tenant: str) -> int:
        return self._held[tenant]

    @property
    def free(self) -> int:
        return self.limit - self.total

    def within_share(self, tenant: str, asked: int) -> bool:
        """May the tenant hold so much more, if that much is free?"""
        return self._held[tenant] + asked <= self.share * self.free

    def change(self, tenant: str, by: int) -> None:
        self.total += by
        self._held[tenant] += by
        if not self._held[tenant]:
            del self._held[tenant]


class Ticket:
    """The places of one request. `window`: how many of its choices may wait at the router."""

    def __init__(self, admission: "Admission", tenant: str, choices: int) -> None:
        self.tenant, self.window = tenant, admission.window
        self._admission, self._left = admission, choices
        admission.change(tenant, *self._places(), 1)

    def moved_up(self) -> None:
        """One choice does not wait any more."""
        self._set(self._left - 1)

    def close(self) -> None:
        """None waits any more."""
        self._set(0)

    def _set(self, left: int) -> None:
        self._admission.change(self.tenant, *self._places(), -1)
        self._left = max(left, 0)
        self._admission.change(self.tenant, *self._places(), 1)

    def _places(self) -> tuple[int, int]:
        """At the router, and in the line."""
        at_router = min(self._left, self.window)
        return at_router, self._left - at_router


class Admission:
    """`limit`: requests that may wait at the router."""

    def __init__(self, limit: int) -> None:
        self.window = min(GROUP_WINDOW, limit)
        self._waiting = Shares(limit, QUEUE_SHARE)
        self._in_lines = Shares(LINE_FACTOR * limit, LINE_SHARE)

    @property
    def waiting(self) -> int:
        """Places at the router that are taken."""
        return self._waiting.total

    @property
    def in_lines(self) -> int:
        """Places in lines that are taken."""
        return self._in_lines.total

    def waits(self, tenant: str) -> int:
        """Places of both kinds that the tenant holds."""
        return self._waiting.held(tenant) + self._in_lines.held(tenant)

    def check(self, tenant: str, choices: int) -> None:
        """Are there places for a request? Raises ApiError. If there are for so many choices,
        there are for fewer."""
        asked = min(choices, self.window)
        in_line = choices - asked
        if in_line > self._in_lines.limit:
            most = self._in_lines.limit + self.window
            raise ApiError.bad_request(
                f"n x prompts is {choices:,}, and at most {most:,} fit: send several requests",
                "prompt",
            )
        for places, number in ((self._waiting, asked), (self._in_lines, in_line)):
            if number > places.free:
                raise ApiError.overloaded(places.total, places.limit, RETRY_S)
            if number and not places.within_share(tenant, number):
                raise ApiError.over_share(places.held(tenant), places.free, RETRY_S)

    def take(self, tenant: str, choices: int) -> Ticket:
        """Places for a request. Raises ApiError."""
        self.check(tenant, choices)
        return Ticket(self, tenant, choices)

    def change(self, tenant: str, waiting: int, in_line: int, sign: int) -> None:
        """For tickets."""
        self._waiting.change(tenant, sign * waiting)
        self._in_lines.change(tenant, sign * in_line)


class Body:
    """The bytes of one body."""

    def __init__(self, shares: Shares, tenant: str, allowance: int) -> None:
        self._shares, self._tenant, self._allowance = shares, tenant, allowance
        self._size = 0

    def add(self, size: int) -> None:
        """So many more have arrived. Raises ApiError."""
        more = self._counted(self._size + size) - self._counted(self._size)
        shares = self._shares
        if more > 0 and (more > shares.free or not shares.within_share(self._tenant, more)):
            raise ApiError.much_arrives(self._shares.total, self._shares.limit, RETRY_S)
        self._size += size
        self._shares.change(self._tenant, more)

    def close(self) -> None:
        """They are not kept any more."""
        self._shares.change(self._tenant, -self._counted(self._size))
        self._size = 0

    def _counted(self, size: int) -> int:
        return max(size - self._allowance, 0)


class Bodies:
    """Memory for bodies that have not become requests yet."""

    def __init__(self, limit: int = MOST_BODY_BYTES, *, allowance: int = ALLOWANCE) -> None:
        """`limit`: bytes, of all clients together. `allowance`: bytes of each body that do not count."""
        self._shares, self._allowance = Shares(limit, QUEUE_SHARE), allowance

    @property
    def held(self) -> int:
        """Bytes that count, of all clients."""
        return self._shares.total

    def body(self, tenant: str) -> Body:
        return Body(self._shares, tenant, self._allowance)
