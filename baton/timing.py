"""Stages: how long each named stage of a piece of work took, on a monotonic clock."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.clock import Clock, monotonic


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage: how often it ran, and how long in all."""

    name: str
    count: int
    total_s: float

    @property
    def mean_s(self) -> float:
        return self.total_s / self.count if self.count else 0.0


class Stages:
    """Named stages, in the order in which they first ended."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._last_lap = clock()
        self._times: dict[str, StageTime] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block; it counts even if the block raises."""
        begun = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - begun)

    def lap(self, name: str) -> None:
        """All the time since the last lap, or since the beginning, was this stage."""
        now = self._clock()
        self.add(name, now - self._last_lap)
        self._last_lap = now

    def add(self, name: str, seconds: float) -> None:
        """This stage ran once more, for so long."""
        known = self._times.get(name, StageTime(name, 0, 0.0))
        self._times[name] = StageTime(name, known.count + 1, known.total_s + seconds)

    def total_s(self, name: str) -> float:
        """Seconds spent in this stage; 0 if it never ran."""
        known = self._times.get(name)
        return known.total_s if known else 0.0

    def rows(self) -> list[StageTime]:
        """Every stage that ran."""
        return list(self._times.values())
