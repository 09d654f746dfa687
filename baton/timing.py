"""Stages: how long each named stage of a piece of work took, on a monotonic clock."""

from baton.clock import Clock, monotonic


class Stages:
    """Seconds of each stage in `times`, in the order in which they first ended."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._last_lap = clock()
        self.times: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap, or since the start, to this stage."""
        now = self._clock()
        self.add(name, now - self._last_lap)
        self._last_lap = now

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to this stage."""
        self.times[name] = self.total_s(name) + seconds

    def total_s(self, name: str) -> float:
        """Seconds spent in this stage; 0 if it never ran."""
        return self.times.get(name, 0.0)
