"""Stuck: when a process that still runs counts as one that will not go on. No clock, no pipe: times are
arguments.

Only time counts in which the supervisor itself looked. Whatever stops the supervisor (a signal, a paused
container, a laptop's lid) often stops the others too: after an hour of that, one look says nothing about
anybody. So a look adds TURN_S at most, however long ago the last was. A machine so busy that looks are
rare is given more time by the same rule.
"""

TURN_S = 1.0
STARTS_S = 120.0
"""Until the first sign of life: imports and a tokenizer, from a slow disk, on a busy machine."""

STOPPED_S = 3.0  # a turn of the supervisor that took so long: it was stopped, or the machine was
PARDON_S = 15.0
"""After that nobody is killed for what others say of him: a router that was stopped too has given up all
its workers, and takes them in again within seconds."""

STUCK_S = {"router": 10.0, "server": 15.0}
"""Silence that no honest turn of these loops comes near: they beat about once a second, and handle
messages for 0.1 s at a time. Workers have long steps, and the router knows how long: it gives them up.
Of a worker that it has not taken in it knows nothing: see Absence."""

STOPPED_START_S = 15.0
IDLE_START_S = 600.0
"""Without any use of the processor. A start may wait so long for another, which compiles the model."""
REJOINS_S = 120.0
"""To finish its step, notice that its router is gone and say Hello to the next one."""
LOOKS_S = 1.0


class Awake:
    """Seconds during which its owner ran, on a scale that stands still meanwhile."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pardon = 0.0  # until when hearsay kills nobody
        self._looked: float | None = None

    def look(self, now: float) -> float:
        """Called each turn. The seconds so far."""
        if self._looked is not None:
            gap_s = max(0.0, now - self._looked)
            self.seconds += min(gap_s, TURN_S)
            if gap_s >= STOPPED_S:
                self.pardon = self.seconds + PARDON_S
        self._looked = now
        return self.seconds


class Silence:
    """How long one life of a process has given no sign. Times are those of Awake."""

    def __init__(self, limit_s: float, awake_s: float) -> None:
        """It was just started. `limit_s`: between two signs of life."""
        self._limit_s = limit_s
        self.began = False  # it has given a sign of life
        self._since = awake_s

    def heard(self, awake_s: float) -> None:
        """It gave a sign of life."""
        self.began, self._since = True, awake_s

    def too_long(self, awake_s: float) -> str:
        """Why it counts as stuck; empty if it does not."""
        silent_s = awake_s - self._since
        if not self.began:
            return f"no sign of life {silent_s:.0f} s after its start" * (silent_s >= STARTS_S)
        return f"no sign of life for {silent_s:.0f} s" * (silent_s >= self._limit_s)


class Absence:
    """How long one life of a worker is in no cluster: it loads, or its router was replaced. Loading may
    take any time, but not without work, so that is what counts. Times are those of Awake."""

    def __init__(self, awake_s: float, *, again: bool = False) -> None:
        """`again`: it was in a cluster already, and nothing has to be loaded."""
        self._again = again
        self._since = self._ran = self._worked = self._looked = awake_s
        self._work: int | None = None

    def due(self, awake_s: float) -> bool:
        """It is time to look at the process, which takes a few reads of /proc."""
        return awake_s - self._looked >= LOOKS_S

    def too_long(self, awake_s: float, *, stopped: bool, work: int | None) -> str:
        """Why it counts as stuck; empty if it does not. `stopped`: a signal holds it up. `work`: what it
        has done so far, None if unknown."""
        self._looked = awake_s
        if not stopped:
            self._ran = awake_s
        if work is None or work != self._work:
            self._work, self._worked = work, awake_s
        if (stopped_s := awake_s - self._ran) >= STOPPED_START_S:
            return f"was stopped for {stopped_s:.0f} s, in no cluster,"
        if (idle_s := awake_s - self._worked) >= IDLE_START_S:
            return f"did nothing for {idle_s:.0f} s of its start"
        if self._again and awake_s - self._since >= REJOINS_S:
            return f"did not join the new router within {REJOINS_S:.0f} s"
        return ""
