"""Subject: a model under evaluation, in this process (engine.py) or behind a server (server.py).

    token_ids  t0 t1 t2 | t3 t4 t5        a Span with start 3: how likely are t3 t4 t5, given t0 t1 t2?
               given      scored

The first token of a sequence has no context, so it is never scored: start is at least 1.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from baton.table import percentile


@dataclass(frozen=True, slots=True)
class Span:
    """`token_ids[start:]` are to be scored, each given all tokens before it."""

    token_ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.token_ids):
            raise ValueError(
                f"start must be 1 to {len(self.token_ids) - 1} for {len(self.token_ids)} tokens, "
                f"got {self.start}"
            )


@dataclass(frozen=True, slots=True)
class Scored:
    """For each scored token: ln of its probability, and whether no other token is likelier."""

    logprobs: tuple[float, ...]
    likeliest: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """A greedy continuation of a prompt."""

    text: str
    tokens: int
    ended: bool  # with the model's end token; else it was cut


@dataclass(frozen=True, slots=True)
class About:
    """The model and how it is run."""

    model: str
    fingerprint: str  # of the folder with its tokenizer
    asked: str  # "in process", or the server's address
    runs: str  # device, dtype and backend; unknown behind a server
    call: str  # the unit that is timed: "forward" or "request"
    context: int
    longest: int  # most tokens of a Span


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of a piece of work. Calls to a server overlap."""

    tokens: int
    seconds: float
    calls: int
    call_median_s: float
    call_p95_s: float

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Meter:
    """Times a piece of work and every call in it."""

    begun: float = field(default_factory=time.perf_counter)
    calls: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Begin a new piece of work."""
        self.calls.clear()
        self.begun = time.perf_counter()

    def called(self, since: float) -> None:
        """Record a call that began at `since` (perf_counter)."""
        self.calls.append(time.perf_counter() - since)

    def speed(self, tokens: int) -> Speed:
        """The speed so far, for `tokens` tokens."""
        seconds = time.perf_counter() - self.begun
        calls = sorted(self.calls) or [0.0]
        return Speed(tokens, seconds, len(self.calls), percentile(calls, 50), percentile(calls, 95))


class Subject(Protocol):
    """A model under evaluation. Results come in the order of the requests."""

    @property
    def about(self) -> About:
        """Its description."""

    @property
    def meter(self) -> Meter:
        """Times its calls."""

    def score(self, spans: Iterable[Span]) -> Iterator[Scored]:
        """Log probabilities of the spans. None may be longer than `about.longest`."""

    def write(self, prompts: Iterable[tuple[int, ...]], new_tokens: int) -> Iterator[Continuation]:
        """Greedy continuations of at most `new_tokens` tokens."""


def groups_of(spans: Iterable[Span], *, tokens: int, most: int) -> Iterator[list[Span]]:
    """Groups of at most `most` spans and `tokens` tokens. A longer span is a group of its own."""
    group: list[Span] = []
    size = 0
    for span in spans:
        if group and (len(group) == most or size + len(span.token_ids) > tokens):
            yield group
            group, size = [], 0
        group.append(span)
        size += len(span.token_ids)
    if group:
        yield group
