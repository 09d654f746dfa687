"""Admission: who may wait here, and how much. Pure: counts in, a ticket or a refusal out.

    ticket = admission.take(tenant, choices)      raises ApiError: 503, or 400 if it can never fit
    ticket.moved_up()                             a choice has its first token, or has ended
    ticket.close()                                the request is over

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
RETRY_S = 2


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
        self.limit, self.line_limit = limit, LINE_FACTOR * limit
        self.window = min(GROUP_WINDOW, limit)
        self._waiting = Counter[str]()
        self._in_lines = Counter[str]()
        self.waiting = self.in_lines = 0  # of all tenants

    def take(self, tenant: str, choices: int) -> Ticket:
        """Places for a request. Raises ApiError."""
        asked = min(choices, self.window)
        in_line = choices - asked
        if in_line > self.line_limit:
            most = self.line_limit + self.window
            raise ApiError.bad_request(
                f"n x prompts is {choices:,}, and at most {most:,} fit: send several requests",
                "prompt",
            )
        free = self.limit - self.waiting
        if asked > free:
            raise ApiError.overloaded(self.waiting, self.limit, RETRY_S)
        held = self._waiting[tenant]
        if held + asked > QUEUE_SHARE * free:
            raise ApiError.over_share(held, free, RETRY_S)
        free = self.line_limit - self.in_lines
        if in_line > free:
            raise ApiError.overloaded(self.in_lines, self.line_limit, RETRY_S)
        held = self._in_lines[tenant]
        if in_line and held + in_line > LINE_SHARE * free:
            raise ApiError.over_share(held, free, RETRY_S)
        return Ticket(self, tenant, choices)

    def change(self, tenant: str, waiting: int, in_line: int, sign: int) -> None:
        """For tickets."""
        self.waiting += sign * waiting
        self.in_lines += sign * in_line
        for counts, number in ((self._waiting, waiting), (self._in_lines, in_line)):
            counts[tenant] += sign * number
            if not counts[tenant]:
                del counts[tenant]
