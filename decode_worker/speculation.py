"""Speculative decoding: cheap draft tokens, checked in one forward of the real model.

A decode step reads all weights for one token of a sequence; for a few tokens more it takes hardly
longer, as long as the batch is small. So a proposer drafts the next tokens, they run as if they were
known, and those that equal what the sampler draws at their positions are accepted. Because a draw is a
function of (logits, seed, position) alone (sampler/sample.py), the tokens are exactly those of plain
decoding, greedy or sampled; no acceptance rule has to keep a distribution.

    tokens ... a b          draft    c d e
    forward over b c d e -> draws    c d x ?      three tokens in one step: c, d and x
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

LONGEST, SHORTEST = 4, 2
"""Tokens of the n-grams that prompt lookup looks for. One token alone is seldom a good guess."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for up to `most` draft tokens after `token_ids`."""

    run: str
    token_ids: Sequence[int]
    most: int


class Proposer(Protocol):
    """Source of draft tokens. They may be wrong, few or none: that costs time, never correctness."""

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The draft tokens of each."""

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
        known = wanted.token_ids
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
    """A proposer, and how many draft tokens of each run are worth it; none without a proposer."""

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
                asked.append(Wanted(each.run, each.token_ids, most))
                budget -= most
        found = self._proposer.propose(asked)
        return {each.run: guesses for each, guesses in zip(asked, found, strict=True) if guesses}

    def update(self, run: str, *, drafted: int, accepted: int) -> None:
        """How many of a run's draft tokens were accepted: while all are, the next draft is longer, else
        one longer than what was accepted. A sequence that is hard to guess wastes one row a step."""
        if drafted:
            hope = self._hopes.get(run, self.most)
            self._hopes[run] = min(self.most, 2 * hope if accepted == drafted else accepted + 1)

    def forget(self, run: str) -> None:
        """The run is over (or was never known)."""
        self._hopes.pop(run, None)
        if self._proposer is not None:
            self._proposer.forget(run)


def accepted_prefix(draft: Sequence[int], drawn: Sequence[int | None]) -> int:
    """How many draft tokens equal the drawn ones, up to the first that does not."""
    pairs = enumerate(zip(draft, drawn, strict=False))
    return next((i for i, (guess, token) in pairs if guess != token), len(draft))
