"""Restarts: when a process that died is started again. No clock, no process: times are arguments.

    level   0    1    2    3    4    5    6    7 ...    +1 a death, -1 for each FORGIVE_S of service
    delay   0   0.5   1    2    4    8   16   30 s      from CRASH_LOOP on it is a crash loop

So a process that served for a while is back at once, one that dies at every start soon costs a start
every half minute, and nothing is given up: what was missing (memory, a file, a device) may come back.
Time before it serves forgives nothing, because loading a large model takes minutes.
"""

from collections import deque

BACK_OFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
FORGIVE_S = 3.0
CRASH_LOOP = 5
RECENT_S = 60.0


class Restarts:
    """Of one process, through all its lives. Times are in seconds, on a clock that never goes back."""

    def __init__(self) -> None:
        self.deaths = 0  # since it last served for long enough to forget them all
        self.down = False  # it has died, and does not serve again yet
        self.due: float | None = None  # when to start it; None while it runs
        self._level = 0
        self._serving_since: float | None = None
        self._times: deque[float] = deque(maxlen=1000)  # of the last deaths

    @property
    def crash_loop(self) -> bool:
        """Whether its starts keep failing."""
        return self._level >= CRASH_LOOP

    @property
    def serving(self) -> bool:
        """Whether it does its work now."""
        return self._serving_since is not None

    @property
    def at_the_longest(self) -> bool:
        """Whether the next wait will be no longer than the last one."""
        return self._level >= len(BACK_OFF_S)

    def recent_deaths(self, now: float) -> int:
        """How often it died within the last minute."""
        return sum(now - each < RECENT_S for each in self._times)

    def started(self) -> None:
        """It was started."""
        self.due = None

    def serves(self, now: float) -> None:
        """It does its work from now on. Only the first call of a life counts."""
        self.down = False
        if self._serving_since is None:
            self._serving_since = now

    def serves_no_more(self, now: float) -> None:
        """It lives, but its cluster is gone: another router has to take it in first."""
        since, self._serving_since = self._serving_since, None
        if since is not None:
            self._level = max(0, self._level - int((now - since) / FORGIVE_S))
        if self._level == 0:
            self.deaths = 0

    def left(self, now: float) -> None:
        """It ended because it was told to: it is started again at once, and this is no death."""
        self.serves_no_more(now)
        self.due = now

    def died(self, now: float) -> float:
        """It died. Returns the seconds until it is started again."""
        self.serves_no_more(now)
        delay_s = BACK_OFF_S[min(self._level, len(BACK_OFF_S) - 1)]
        self._level = min(self._level + 1, len(BACK_OFF_S))
        self.deaths += 1
        self._times.append(now)
        self.down = True
        self.due = now + delay_s
        return delay_s
