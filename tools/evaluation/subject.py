"""Subject: a model that is asked. In this process (engine.py) or through a server (server.py).

    token_ids  t0 t1 t2 | t3 t4 t5        a Span with start 3: how likely are t3 t4 t5, given t0 t1 t2?
               given      scored

The first token of a sequence has nothing before it, so it is never scored: start is at least 1.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from baton.table import percentile


@dataclass(frozen=True, slots=True)
class Span:
    """`token_ids[start:]` are to be scored, each given all before it."""

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
    """Of each scored token: ln of its probability, and whether none was likelier."""

    logprobs: tuple[float, ...]
    likeliest: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the model writes after a prompt, taking the likeliest token each time."""

    text: str
    tokens: int
    ended: bool  # by an end token of the model's own; else it was cut


@dataclass(frozen=True, slots=True)
class About:
    """Who is asked, and how."""

    model: str
    fingerprint: str  # of the folder that its tokenizer is from
    asked: str  # in process, or the server's address
    runs: str  # device, dtype and what computes it; of a server not known
    call: str  # what one call is: a forward, or a request
    context: int
    longest: int  # tokens of a Span at most


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast some work went. Calls of a server overlap."""

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
    """Takes the time of a piece of work and of every call in it."""

    begun: float = field(default_factory=time.perf_counter)
    calls: list[float] = field(default_factory=list)

    def start(self) -> None:
        """A new piece of work begins."""
        self.calls.clear()
        self.begun = time.perf_counter()

    def called(self, since: float) -> None:
        """A call that was begun at `since` is over."""
        self.calls.append(time.perf_counter() - since)

    def speed(self, tokens: int) -> Speed:
        """So many tokens came of it."""
        seconds = time.perf_counter() - self.begun
        calls = sorted(self.calls) or [0.0]
        return Speed(tokens, seconds, len(self.calls), percentile(calls, 50), percentile(calls, 95))


class Subject(Protocol):
    """A model that is asked. What is asked for comes in the order in which it was asked."""

    @property
    def about(self) -> About:
        """Who it is."""

    @property
    def meter(self) -> Meter:
        """Counts the calls."""

    def score(self, spans: Iterable[Span]) -> Iterator[Scored]:
        """How likely the model holds them. None is longer than `about.longest`."""

    def write(self, prompts: Iterable[tuple[int, ...]], new_tokens: int) -> Iterator[Continuation]:
        """Greedy continuations of at most `new_tokens` tokens."""
