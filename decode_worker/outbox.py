"""Outbox: tokens on their way to the router. Those that nobody is watching come wait for each other.

A message costs the router and the client about as much for one token as for ten, and on a CPU they take
it from the very cores that decode. So a run says how long its tokens may wait (Start.tell_every_s); its
first and its last go at once, and take with them whatever else is there. Times are those at which steps
begin: what a step samples is there at its end, so what is not told then waits for one step more.
"""

from dataclasses import dataclass, field

from baton.request import Logprob
from baton.wire.messages import Decoded, Said
from baton.wire.node import ROUTER, To
from decode_worker.model import Drawn
from decode_worker.runs import Run


@dataclass(slots=True)
class _Held:
    """What one run has said since it was last told."""

    run: Run
    position: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str | None = None


class Outbox:
    """In order: what was put in first is told first."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._deadline = float("inf")

    def put(self, name: str, run: Run, drawn: Drawn, finish: str | None, now: float) -> None:
        """The token that this run has just come by, and why it ends with it, if it does."""
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = _Held(run, len(run.known) - 1)
        held.token_ids.append(drawn.token_id)
        held.times.append(now)
        held.finish = finish
        if drawn.logprob is not None:
            held.logprobs.append(drawn.logprob)
        waits = run.told and finish is None
        self._deadline = min(self._deadline, held.times[0] + run.tell_every_s if waits else now)

    def due(self, now: float) -> float:
        """Seconds until it must be emptied."""
        return max(0.0, self._deadline - now)

    def empty(self, now: float) -> list[To]:
        """All there is, as one message; none if there is nothing."""
        if not self._held:
            return []
        runs = tuple(_said(name, held, now) for name, held in self._held.items())
        for held in self._held.values():
            held.run.told = True
        self.clear()
        return [To(ROUTER, Decoded(runs))]

    def drop(self, name: str) -> None:
        """Nobody wants to hear of this run any more."""
        self._held.pop(name, None)
        if not self._held:
            self.clear()

    def clear(self) -> None:
        """There is nothing to tell."""
        self._held.clear()
        self._deadline = float("inf")


def _said(name: str, held: _Held, now: float) -> Said:
    waited = held.times[0] < now
    return Said(
        name,
        held.position,
        tuple(held.token_ids),
        held.finish,
        tuple(held.logprobs),
        tuple([now - at for at in held.times]) if waited else (),
    )
