"""TokenBuffer: batches tokens before they are sent to the router.

Router and client spend about as much on a message with one token as on one with ten, and on a CPU they
compete with decode for cores. So each request has a stream_interval_s, the longest delay of its tokens. A
run's first and last token are sent at once, together with all tokens that have waited half of their time.
With many runs the delay grows: see flush_interval().

Times are those at which steps begin; a step's tokens exist at its end.
"""

from dataclasses import dataclass, field
from typing import Protocol

from baton.params import GenerationParams
from baton.wire.messages import Decoded, RunTokens
from baton.wire.node import ROUTER, To
from baton.wire.records import Logprob
from decode_worker.model import Drawn

FEW_RUNS = 10
"""Up to so many runs get exactly their interval."""

NOTICEABLE_S = 0.1
"""From this delay on a reader sees tokens arrive in groups."""


def flush_interval(stream_interval_s: float, runs: int) -> float:
    """The longest delay of a run's tokens, in seconds. Above FEW_RUNS it grows with the number of runs,
    up to NOTICEABLE_S, to keep the message rate constant. 0 stays 0."""
    return max(stream_interval_s, min(stream_interval_s * runs / FEW_RUNS, NOTICEABLE_S))


class Streamed(Protocol):
    """A run whose tokens are buffered. `sent`: its first token was sent."""

    token_ids: list[int]
    params: GenerationParams
    sent: bool


@dataclass(slots=True)
class _Buffered:
    """One run's tokens since its last message."""

    run: Streamed
    position: int
    deadline: float
    due: float  # from this time on they join any message that is sent
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str | None = None


class TokenBuffer:
    """Tokens by run, first in, first out."""

    def __init__(self) -> None:
        self._held: dict[str, _Buffered] = {}
        self._deadline = float("inf")

    def put(
        self,
        name: str,
        run: Streamed,
        drawn: Drawn,
        finish: str | None,
        now: float,
        *,
        runs: int = 1,
    ) -> None:
        """Add a run's new token; `finish` is set with its last. `runs`: how many decode."""
        held = self._held.get(name)
        if held is None:
            wait = flush_interval(run.params.stream_interval_s, runs) if run.sent else 0.0
            held = _Buffered(run, len(run.token_ids) - 1, now + wait, now + wait / 2)
            self._held[name] = held
        held.token_ids.append(drawn.token_id)
        held.times.append(now)
        if drawn.logprob is not None:
            held.logprobs.append(drawn.logprob)
        if finish is not None:
            held.finish = finish
            held.deadline = held.due = now
        self._deadline = min(self._deadline, held.deadline)

    def due(self, now: float) -> float:
        """Seconds to the next deadline."""
        return max(0.0, self._deadline - now)

    def take_due(self, now: float, soon: float) -> list[To]:
        """One message with the tokens due by `soon`; none before a deadline."""
        if self._deadline > soon:
            return []
        due = [name for name, held in self._held.items() if held.due <= soon]
        sent = self._send({name: self._held.pop(name) for name in due}, now)
        self._deadline = min((held.deadline for held in self._held.values()), default=float("inf"))
        return sent

    def flush(self, now: float) -> list[To]:
        """One message with all tokens, if there are any."""
        sent = self._send(self._held, now)
        self.clear()
        return sent

    def _send(self, held: dict[str, _Buffered], now: float) -> list[To]:
        for each in held.values():
            each.run.sent = True
        runs = tuple([_run_tokens(name, each, now) for name, each in held.items()])
        return [To(ROUTER, Decoded(runs))] if runs else []

    def drop(self, name: str) -> None:
        """Discard the tokens of a cancelled run."""
        self._held.pop(name, None)
        if not self._held:
            self.clear()

    def clear(self) -> None:
        self._held.clear()
        self._deadline = float("inf")


def _run_tokens(name: str, held: _Buffered, now: float) -> RunTokens:
    waited = held.times[0] < now
    return RunTokens(
        name,
        held.position,
        tuple(held.token_ids),
        held.finish,
        tuple(held.logprobs),
        tuple([now - at for at in held.times]) if waited else (),
    )
