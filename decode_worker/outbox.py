"""Outbox: tokens on their way to the router. Those that nobody is watching come wait for each other.

A message costs the router and the client about as much for one token as for ten, and on a CPU they take
it from the very cores that decode. So a run says how long its tokens may wait (stream_interval_s); its
first and its last go at once, and take with them whoever has waited half of its time already. Where many
are at work, what is told of each costs more than the message: then tokens wait longer, see patience().
Times are those at which steps begin: what a step samples is there at its end, so what is not told then
waits for one step more.
"""

from dataclasses import dataclass, field

from baton.wire.messages import Decoded, Said
from baton.wire.node import ROUTER, To
from baton.wire.records import Logprob
from decode_worker.model import Drawn
from decode_worker.runs import Run

AT_EASE = 10
"""So many runs may each be told as often as they ask."""

NOTICED_S = 0.1
"""A reader would begin to notice that tokens come together."""


def patience(stream_interval_s: float, runs: int) -> float:
    """How long a token may wait, of a run among so many. With more than AT_EASE the time grows with their
    number, so that the pieces that router, server and clients handle each second do not; up to
    NOTICED_S. At once (0) stays at once."""
    return max(stream_interval_s, min(stream_interval_s * runs / AT_EASE, NOTICED_S))


@dataclass(slots=True)
class _Held:
    """What one run has said since it was last told."""

    run: Run
    position: int
    due: float
    ripe: float  # from then on it goes along with others
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str | None = None


class Outbox:
    """In order: what was put in first is told first."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._deadline = float("inf")

    def put(
        self, name: str, run: Run, drawn: Drawn, finish: str | None, now: float, *, runs: int = 1
    ) -> None:
        """The token that this run, one of so many, has just come by, and why it ends with it, if it
        does."""
        held = self._held.get(name)
        if held is None:
            wait = patience(run.params.stream_interval_s, runs) if run.told else 0.0
            held = _Held(run, len(run.known) - 1, now + wait, now + wait / 2)
            self._held[name] = held
        held.token_ids.append(drawn.token_id)
        held.times.append(now)
        if drawn.logprob is not None:
            held.logprobs.append(drawn.logprob)
        if finish is not None:
            held.finish = finish
            held.due = held.ripe = now
        self._deadline = min(self._deadline, held.due)

    def due(self, now: float) -> float:
        """Seconds until something must be told."""
        return max(0.0, self._deadline - now)

    def ripe(self, now: float, soon: float) -> list[To]:
        """What must be told by `soon`, and what may go along with it, as one message."""
        if self._deadline > soon:
            return []
        ripe = [name for name, held in self._held.items() if held.ripe <= soon]
        told = self._tell({name: self._held.pop(name) for name in ripe}, now)
        self._deadline = min((held.due for held in self._held.values()), default=float("inf"))
        return told

    def empty(self, now: float) -> list[To]:
        """All there is, as one message; none if there is nothing."""
        told = self._tell(self._held, now)
        self.clear()
        return told

    def _tell(self, held: dict[str, _Held], now: float) -> list[To]:
        for each in held.values():
            each.run.told = True
        said = tuple([_said(name, each, now) for name, each in held.items()])
        return [To(ROUTER, Decoded(said))] if said else []

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
