"""Paces: what one worker has learnt of its forwards, for each number of cores it has had. Pure.

The router takes cores from a worker and gives them back (router/cores.py), often within a second. One
estimate for all of them would be wrong most of the time: a prompt token takes twice as long on half of the
cores. So each number of cores has its own, and heartbeats carry them all: the router decides by them who
fills a prompt (router/role_policy.py).
"""

from collections.abc import Sequence

from baton.pace import Pace, Span
from baton.wire.records import Speed

REMEMBERED = 64
"""Numbers of cores; more than workers on one host ever have."""


class Paces:
    """Of one worker. `now` is that with its present cores."""

    def __init__(self, pace: Pace | None = None) -> None:
        """`pace`: measured at boot."""
        self._cores = 0  # not told; on a GPU never
        self._known = {0: pace or Pace()}

    @property
    def now(self) -> Pace:
        return self._known[self._cores]

    def use(self, cores: int) -> None:
        """From now on it has so many. What is not known of them is guessed from those before."""
        if cores not in self._known and len(self._known) < REMEMBERED:
            before = self._cores
            self._known[cores] = self.now.on_cores(cores / before) if before else self.now
        self._cores = cores if cores in self._known else self._cores

    def after(self, chunks: Sequence[Span], took_s: float) -> None:
        """A forward with these chunks took so long."""
        self._known[self._cores] = self.now.after(chunks, took_s)

    def report(self) -> tuple[Speed, ...]:
        """All of them, the present one first. What was measured at boot counts until the first order
        about cores."""
        told = [self._cores, *(each for each in self._known if each not in (0, self._cores))]
        return tuple(
            Speed(cores, self._known[cores].forward_s, self._known[cores].token_s)
            for cores in told
        )
