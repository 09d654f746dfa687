"""Paces: what one worker has learnt of its forwards, for each number of cores it has had. Pure.

The router takes cores from a worker and gives them back (router/cores.py), often within a second. A
prompt token takes twice as long on half of the cores, so each number of cores has its own time of a
token. The fixed part of a forward depends on the streams, too, which are others each time: it is scaled
from what it was a moment ago. Heartbeats carry all of it: the router decides by it who fills a prompt
(router/role_policy.py).
"""

from collections.abc import Sequence
from dataclasses import replace

from baton.pace import TRUST, Pace, Span
from baton.wire.records import Speed

REMEMBERED = 64
"""Numbers of cores; more than workers on one host ever have."""


class Paces:
    """Of one worker. `now` is that with its present cores."""

    def __init__(self, pace: Pace | None = None, cores: int = 0) -> None:
        """`pace`: measured at boot, on so many cores (0: not told; on a GPU always)."""
        self.now = pace or Pace()
        self._cores = cores
        self._token_s: dict[int, float] = {}
        self.requests = 1.0  # that took part in the forwards behind `now`
        self._boot = cores, self.now
        self._idle: dict[int, Pace] = {}  # with one request and nothing else

    def use(self, cores: int) -> None:
        """From now on it has so many."""
        self.now, self._cores = self._on(cores), cores

    def after(self, chunks: Sequence[Span], took_s: float, *, requests: int = 1) -> None:
        """A forward with these chunks took so long. `requests`: that took part."""
        cores = self._cores
        self.now = self.now.after(chunks, took_s)
        self.requests += TRUST * (requests - self.requests)
        if chunks and (cores in self._token_s or len(self._token_s) < REMEMBERED):
            self._token_s[cores] = self.now.token_s
        if requests == 1 and (cores in self._idle or len(self._idle) < REMEMBERED):
            self._idle[cores] = self._idle_on(cores).after(chunks, took_s)

    def report(self) -> tuple[Speed, ...]:
        """The present one first, then those of the other numbers of cores."""
        others = {
            cores: self._on(cores) for cores in self._token_s if cores not in (0, self._cores)
        }
        return tuple(
            _speed(cores, pace) for cores, pace in ({self._cores: self.now} | others).items()
        )

    @property
    def idle(self) -> tuple[Speed, ...]:
        """Of a worker with nothing else to do, for each number of cores with which that was so; before,
        that at boot. What it has to do later does not change it, nor does another router: limits that a
        user leaves open are so many times this one."""
        known = self._idle or dict([self._boot])
        return tuple(_speed(cores, pace) for cores, pace in known.items())

    def _idle_on(self, cores: int) -> Pace:
        known = self._idle or dict([self._boot])
        near = min(known, key=lambda each: abs(each - cores))
        pace = known[near]
        return pace.on_cores(cores / near) if near and cores else pace

    def _on(self, cores: int) -> Pace:
        guess = self.now.on_cores(cores / self._cores) if self._cores and cores else self.now
        return replace(guess, token_s=self._token_s.get(cores, guess.token_s))


def _speed(cores: int, pace: Pace) -> Speed:
    return Speed(cores, pace.forward_s, pace.token_s)
