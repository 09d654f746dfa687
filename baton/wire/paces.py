"""Paces: what one worker has learnt of its forwards, for each number of cores it has had. Pure.

The router takes cores from a worker and gives them back (router/cores.py), often within a second. A
prompt token takes twice as long on half of the cores, so each number of cores has its own time of a
token. The fixed part of a forward depends on the streams, too, which are others each time: it is scaled
from what it was a moment ago. Heartbeats carry all of it: the router decides by it who fills a prompt
(router/role_policy.py).
"""

from collections.abc import Sequence
from dataclasses import replace

from baton.pace import Pace, Span
from baton.wire.records import Speed

REMEMBERED = 64
"""Numbers of cores; more than workers on one host ever have."""


class Paces:
    """Of one worker. `now` is that with its present cores."""

    def __init__(self, pace: Pace | None = None) -> None:
        """`pace`: measured at boot."""
        self.now = pace or Pace()
        self._cores = 0  # not told; on a GPU never
        self._token_s: dict[int, float] = {}

    def use(self, cores: int) -> None:
        """From now on it has so many."""
        self.now, self._cores = self._on(cores), cores

    def after(self, chunks: Sequence[Span], took_s: float) -> None:
        """A forward with these chunks took so long."""
        self.now = self.now.after(chunks, took_s)
        if chunks and (self._cores in self._token_s or len(self._token_s) < REMEMBERED):
            self._token_s[self._cores] = self.now.token_s

    def report(self) -> tuple[Speed, ...]:
        """The present one first, then those of the other numbers of cores."""
        others = {
            cores: self._on(cores) for cores in self._token_s if cores not in (0, self._cores)
        }
        return tuple(
            Speed(cores, pace.forward_s, pace.token_s)
            for cores, pace in ({self._cores: self.now} | others).items()
        )

    def _on(self, cores: int) -> Pace:
        guess = self.now.on_cores(cores / self._cores) if self._cores and cores else self.now
        return replace(guess, token_s=self._token_s.get(cores, guess.token_s))
