"""Speculative decoding: cheap guesses of the next tokens, checked in one forward of the real model.

A decode step reads all weights for one token of a sequence; for a few tokens more it takes hardly
longer, as long as the batch is small. So a proposer guesses what comes next, the guesses run as if
they were known, and those that are what the sampler draws at their positions stand. Because a draw
is a function of (logits, seed, position) alone (sampler/sample.py), the tokens are exactly those of
plain decoding, greedy or sampled; there is no acceptance rule that has to keep a distribution.

    known  ... a b          guesses  c d e
    forward over b c d e -> draws    c d x ?      three tokens in one step: c, d and x
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

LONGEST, SHORTEST = 4, 2
"""Tokens of the n-grams that prompt lookup looks for. One token alone is seldom a good guess."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Up to `most` guesses of what follows `known` in this run."""

    run: str
    known: Sequence[int]
    most: int


class Proposer(Protocol):
    """Who guesses. Guesses may be wrong, few or none: that costs time, never correctness."""

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """For each, its guesses in order."""

    def forget(self, run: str) -> None:
        """The run is over (or was never known)."""


@dataclass(slots=True)
class _Seen:
    """Where each n-gram of a sequence was last followed by something."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0


class PromptLookup:
    """What followed the last few tokens when they stood together before (Saxena, "Prompt lookup
    decoding", 2023). Good where answers repeat their prompt or themselves: summaries, code edits."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """See Proposer."""
        return [self._look_up(each) for each in wanted]

    def forget(self, run: str) -> None:
        """See Proposer."""
        self._seen.pop(run, None)

    def _look_up(self, wanted: Wanted) -> list[int]:
        known = wanted.known
        seen = self._seen.setdefault(wanted.run, _Seen())
        for end in range(max(seen.indexed, SHORTEST), len(known)):  # known[end] follows them
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                seen.after[tuple(known[end - length : end])] = end
        seen.indexed = max(seen.indexed, len(known))
        for length in range(min(LONGEST, len(known)), SHORTEST - 1, -1):
            begin = seen.after.get(tuple(known[-length:]))
            if begin is not None:
                return list(known[begin : begin + wanted.most])
        return []


class Speculation:
    """Who guesses, and how much is worth asking for. Without a proposer nothing is guessed."""

    def __init__(self, proposer: Proposer | None = None, most: int = 0) -> None:
        self._proposer = proposer
        self.most = most if proposer is not None else 0
        self._hopes: dict[str, int] = {}

    def guess(self, wanted: Sequence[Wanted], budget: int) -> dict[str, list[int]]:
        """Guesses for these runs, at most `budget` in all and `most` of each."""
        if self._proposer is None:
            return {}
        asked = []
        for each in wanted:
            most = min(each.most, self._hopes.get(each.run, self.most), budget)
            if most > 0:
                asked.append(Wanted(each.run, each.known, most))
                budget -= most
        found = self._proposer.propose(asked)
        return {each.run: guesses for each, guesses in zip(asked, found, strict=True) if guesses}

    def heard(self, run: str, *, guessed: int, stood: int) -> None:
        """How many of a run's guesses stood: it is asked for more while all do, else for one more
        than did. So a sequence that is hard to guess wastes one row a step."""
        if guessed:
            hope = self._hopes.get(run, self.most)
            self._hopes[run] = min(self.most, 2 * hope if stood == guessed else stood + 1)

    def forget(self, run: str) -> None:
        """The run is over (or was never known)."""
        self._hopes.pop(run, None)
        if self._proposer is not None:
            self._proposer.forget(run)


def standing(guessed: Sequence[int], drawn: Sequence[int | None]) -> int:
    """How many guesses are what was drawn in their place, before the first that is not."""
    pairs = enumerate(zip(guessed, drawn, strict=False))
    return next((i for i, (guess, token) in pairs if guess != token), len(guessed))
