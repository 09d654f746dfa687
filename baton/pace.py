"""Pace: how long forwards take, learnt from those before, and which prompts the next one computes.

A forward is not interrupted: what arrives meanwhile waits for its end, and so do the streams that a
decode worker is generating. So a forward is limited by time, and long prompts are cut into chunks:
share_out(). Pure; prefill and decode workers measure and ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, sqrt
from typing import NamedTuple

FORWARD_S = 0.025
"""A forward with prompt tokens takes at most about so long. Much less would cost speed, because each
forward has a fixed part."""

FIXED_PARTS = 3
"""It may take so many times its fixed part, where that is more than FORWARD_S. Else a large model would
spend most of its time on reading its weights for a few tokens."""

LEAST_TOKENS = 64
"""Prompt tokens that fit any forward. From about so many on a CPU computes them at full speed: GPT-2's
shape takes 12 ms for one token, 19 for 16, 38 for 64, 72 for 128."""

FEWEST_TOKENS = 16
"""The same where a user limits the time between tokens: shorter forwards are worth some speed then."""

ITL_PART = 0.85
"""Of the time that a user allows between tokens: the rest is for what no estimate knows."""

CONTEXT = 4000
"""A token so far into its sequence takes twice as long as the first one, because of attention. It is
1,200 to 20,000 for the models here; what is wrong with it, the next forwards correct in `token_s`."""

TRUST, FURTHEST = 0.5, 8.0
"""After a forward that took r times what was expected, the next expectation is r ** TRUST times as long.
r counts as at most FURTHEST and at least 1 / FURTHEST: a forward during which the machine slept says
nothing about the next one."""

SHORTEST_S, LONGEST_S = 1e-9, 60.0  # of each of Pace's fields


class Prompt(NamedTuple):
    """What is left of a prompt: `left` tokens from position `start` on. `most`: limit of its tokens in
    one forward."""

    start: int
    left: int
    most: int | None = None


class Span(NamedTuple):
    """`tokens` of a prompt, from position `start` on."""

    start: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a forward: `forward_s` of any, and `token_s` for each prompt token in it. What a decode
    worker does for its streams is part of `forward_s`. The defaults are a slow guess, for a worker that
    has measured nothing yet. `longest_s` is not learnt: what a user allows for a forward with streams."""

    forward_s: float = 0.005
    token_s: float = 0.0003
    longest_s: float = inf

    @classmethod
    def measured(cls, one_s: float, some_s: float, tokens: int) -> "Pace":
        """From the seconds of a forward with one token and of one with so many `tokens`, at boot. A
        token's time is rather too long than too short, so that the first chunks are rather short."""
        more = (some_s - one_s) / max(1, tokens - 1)
        return cls(max(one_s, SHORTEST_S), max(more, some_s / tokens / 10, SHORTEST_S))

    def chunk_s(self, chunk: Span) -> float:
        """Seconds that a chunk adds to a forward."""
        return self.token_s * _weight(chunk)

    def tokens_within(self, seconds: float, start: int) -> int:
        """The longest chunk from position `start` on that adds at most so many seconds."""
        weight = max(0.0, seconds) / self.token_s
        first = 1 + start / CONTEXT
        # n * first + n * n / (2 * CONTEXT) = weight, without the textbook formula's cancellation
        return int(2 * weight / (first + sqrt(first * first + 2 * weight / CONTEXT)))

    def room_s(self) -> float:
        """Seconds for the chunks of one forward."""
        return max(FORWARD_S, FIXED_PARTS * self.forward_s) - self.forward_s

    def space_s(self, start: int = 0, least: int = LEAST_TOKENS) -> float:
        """Seconds for the chunks of a forward whose oldest prompt is at position `start`: `least` tokens
        fit any, fewer where streams have a limit. Never 0."""
        room_s = max(self.room_s(), self.chunk_s(Span(start, least)))
        fewest_s = self.chunk_s(Span(start, min(least, FEWEST_TOKENS)))
        return max(min(room_s, self.longest_s - self.forward_s), fewest_s)

    def step_s(self, start: int = 0) -> float:
        """Seconds of a forward that is full of prompt tokens from position `start` on."""
        return self.forward_s + self.space_s(start)

    def limited(self, itl_s: float) -> "Pace":
        """Streams want a token within so many seconds of the one before; 0: no limit."""
        return Pace(self.forward_s, self.token_s, ITL_PART * itl_s) if itl_s else self

    def fill_s(self, prompt: Span, beside: float = 0.0) -> float:
        """Seconds until this whole prompt is computed, in as many forwards as it takes, and `beside` it
        prompts that take so many seconds."""
        work = self.chunk_s(prompt) + beside
        forwards = max(1, ceil(work / self.space_s(prompt.start)))
        return work + forwards * self.forward_s

    def fill_rate(self) -> float:
        """Tokens a second of long prompts that are filled in forward after forward."""
        return self.space_s() / (self.token_s * self.step_s())

    def on_cores(self, share: float) -> "Pace":
        """A guess of the pace with `share` times the cores. What is fixed is mostly reading weights: more
        cores speed it up less."""
        forward_s, token_s = self.forward_s / sqrt(share), self.token_s / share
        return Pace(bounded(forward_s), bounded(token_s), self.longest_s)

    def after(self, chunks: Sequence[Span], took_s: float) -> "Pace":
        """The pace after a forward with these chunks. Each field moves by its share of the expected time,
        so short forwards correct the fixed part and long ones the tokens. A clock too coarse to see the
        forward says nothing."""
        if took_s <= 0:
            return self
        expected = self.forward_s + sum(self.chunk_s(chunk) for chunk in chunks)
        ratio = min(max(took_s / expected, 1 / FURTHEST), FURTHEST)

        def moved(field: float, share: float) -> float:
            factor: float = ratio ** (TRUST * share)
            return bounded(field * factor)

        fixed = self.forward_s / expected
        forward_s, token_s = moved(self.forward_s, fixed), moved(self.token_s, 1 - fixed)
        return Pace(forward_s, token_s, self.longest_s)


@dataclass(slots=True)
class TokenBudget:
    """How many tokens one forward may have: `most`, and fewer for a while after memory ran out. It grows
    by a sixteenth with each forward that went well, so that one in a dozen tries at most is lost."""

    most: int
    now: int = field(init=False)
    _alone: bool = field(
        init=False, default=False
    )  # a single token did not fit, and may be tried again

    def __post_init__(self) -> None:
        self.now = self.most

    @property
    def runs(self) -> int | None:
        """How many runs one forward may have, the oldest, while memory is short: each has a token. None:
        all of them."""
        return self.now if self.now < self.most else None

    def ran_out(self, tokens: int) -> bool:
        """A forward with so many tokens did not fit the memory. False if it was a single token, tried for
        the second time: others may have given memory back in between."""
        again = tokens > 1 or not self._alone
        self._alone = tokens == 1 and again
        self.now = max(1, tokens // 2)
        return again

    def went_well(self) -> None:
        self._alone = False
        self.now = min(self.most, self.now + 1 + self.now // 16)


def share_out(prompts: Sequence[Prompt], pace: Pace, *, token_budget: int) -> list[int]:
    """How many tokens of each prompt the next forward computes, at most `token_budget` in all.

    `prompts` is in order of arrival. Half of the forward, in tokens and in time, is the oldest's, and at
    least LEAST_TOKENS / 2: it advances whatever comes after it. The rest goes to those with the least
    left: short prompts do not wait for long ones.
    """
    if not prompts:
        return []
    given = [0] * len(prompts)
    oldest = prompts[0]
    least = min(token_budget, LEAST_TOKENS)
    room_s = pace.space_s(oldest.start, least)
    least = least if pace.longest_s == inf else min(least, FEWEST_TOKENS)
    fits = max(pace.tokens_within(room_s / 2, oldest.start), least // 2)
    given[0] = min(max(1, min(fits, token_budget // 2)), _still(oldest, 0))
    token_budget -= given[0]
    room_s -= pace.chunk_s(Span(oldest.start, given[0]))
    for index in sorted(range(len(prompts)), key=lambda i: prompts[i].left - given[i]):
        prompt, before = prompts[index], given[index]
        start = prompt.start + before
        fits = pace.tokens_within(room_s, start)
        more = max(0, min(fits, token_budget, _still(prompt, before)))
        given[index] += more
        token_budget -= more
        room_s -= pace.chunk_s(Span(start, more))
    return given


def _still(prompt: Prompt, given: int) -> int:
    most = prompt.left if prompt.most is None else min(prompt.left, prompt.most)
    return most - given


def bounded(seconds: float) -> float:
    """As each of Pace's fields is."""
    return min(max(seconds, SHORTEST_S), LONGEST_S)


def _weight(chunk: Span) -> float:
    """Its tokens, counted by how long they take."""
    return chunk.tokens * (1 + (chunk.start + chunk.tokens / 2) / CONTEXT)
