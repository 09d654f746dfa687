"""Health: whether the upstream takes requests, why not, and when to look again. Pure.

    up    -- it refuses connections, breaks a stream, answers 401 ... --> down: looked at until it serves
    up    -- 429, 503 --> busy: until the time it names, or a run here has ended

While it is up it is looked at every CHECK_S: a host that is gone closes no connection.
"""

from dataclasses import dataclass
from enum import Enum, auto

CHECK_S = 5.0
AGAIN_S, MOST_AGAIN_S = 0.25, 10.0
"""Between two looks at an upstream that is down: doubled each time."""
BUSY_S, MOST_BUSY_S = 0.5, 60.0
"""The pause after 429 or 503 that names no time: doubled each time; and the most that is believed."""
MISSES = 3
"""Looks without an answer in a row, and nothing heard meanwhile, until it counts as gone."""


class Look(Enum):
    """How thoroughly to look."""

    LIGHT = auto()  # does it answer?
    WHOLE = auto()  # is it still the server and the model that it was?


class Blame(Enum):
    """What an HTTP status of a completion says."""

    REQUEST = auto()  # this request is refused
    BUSY = auto()
    SETTING = auto()  # the key, the model's name, the path: no request would be served
    SERVER = auto()  # an error, perhaps of this request's making


def blame(status: int) -> Blame:
    """Whose fault a completion's status is."""
    if status in (429, 503):
        return Blame.BUSY
    if status in (400, 413, 422):
        return Blame.REQUEST
    return Blame.SERVER if status >= 500 else Blame.SETTING


@dataclass(slots=True)
class Health:
    """Of one upstream. Times are those of the worker's loop."""

    _down: str = ""
    _busy: str = ""
    _busy_until: float = 0.0
    _busy_times: int = 0
    _next_look: float = 0.0
    _wait_s: float = AGAIN_S
    _looking: bool = False
    _misses: int = 0

    def why(self, now: float) -> str:
        """Why it takes no requests now; empty if it does."""
        return self._down or (self._busy if now < self._busy_until else "")

    @property
    def out_of_order(self) -> bool:
        """It does not serve."""
        return bool(self._down)

    def look(self, now: float) -> Look | None:
        """What to do now; the answer comes by found() or missed()."""
        if self._looking or now < self._next_look:
            return None
        self._looking = True
        return Look.WHOLE if self._down else Look.LIGHT

    def due(self, now: float) -> float:
        """Seconds until something changes by time alone."""
        times = [] if self._looking else [self._next_look]
        if not self._down and now < self._busy_until:
            times.append(self._busy_until)
        return max(0.0, min(times, default=float("inf")) - now)

    # ---- what was found

    def heard(self) -> None:
        """Tokens came."""
        self._misses = self._busy_times = 0

    def found(self, how: Look, now: float) -> None:
        """It serves. A light look that was under way when it went down does not bring it back."""
        self._looking, self._misses = False, 0
        if self._down and how is Look.LIGHT:
            self._next_look = now
            return
        self._down = ""
        self._wait_s, self._next_look = AGAIN_S, now + CHECK_S

    def missed(self, why: str, now: float, *, answered: bool) -> bool:
        """A look failed. `answered`: by the server or its host, so it is certain. True: it is gone, and
        nothing of what runs there will come."""
        self._looking = False
        self._misses += 1
        gone = not answered and self._misses >= MISSES
        if answered or gone or self._down:
            self.down(why, now)
            self._next_look, self._wait_s = now + self._wait_s, min(2 * self._wait_s, MOST_AGAIN_S)
        else:
            self._next_look = now
        return gone

    def down(self, why: str, now: float) -> None:
        """It cannot be used until a look finds that it can."""
        if not self._down:
            self._wait_s, self._next_look = AGAIN_S, now
        self._down = why

    def busy(self, why: str, retry_after_s: float | None, now: float) -> None:
        """It takes no more for now."""
        wait = BUSY_S * 2**self._busy_times if retry_after_s is None else retry_after_s
        self._busy_times = min(self._busy_times + 1, 8)
        self._busy, self._busy_until = why, now + min(wait, MOST_BUSY_S)

    def freed(self) -> None:
        """A run has ended there: it may take another one."""
        self._busy_until = 0.0
