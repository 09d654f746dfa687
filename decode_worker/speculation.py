"""Speculative decoding: cheap draft tokens, checked in one forward of the real model.

A decode step reads all weights for one token of a sequence; a few more tokens take hardly longer while
the batch is small. So a proposer drafts the next tokens, they run as if they were known, and those that
equal what the sampler draws at their positions are accepted. Since a draw is a function of (logits, seed,
position) alone (sampler/sample.py), the result is exactly that of plain decoding, greedy or sampled.

    tokens ... a b          draft    c d e
    forward over b c d e -> draws    c d x ?      three tokens in one step: c, d and x
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.wire.tally import Tally

LONGEST, SHORTEST = 4, 2
"""Lengths of the n-grams that prompt lookup matches. A single token seldom predicts well."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for up to `most` draft tokens after `token_ids`."""

    run: str
    token_ids: Sequence[int]
    most: int


class Proposer(Protocol):
    """Source of draft tokens. Wrong, few or no drafts cost time, never correctness."""

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """The draft tokens of each request, at most `most`."""

    def forget(self, run: str) -> None:
        """The run is over (or was never known)."""


@dataclass(slots=True)
class _Seen:
    """The index of the token that last followed each n-gram of a sequence."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0


class PromptLookup:
    """Drafts what followed the last few tokens at their previous occurrence (Saxena, "Prompt lookup
    decoding", 2023). Good where answers repeat their prompt or themselves: summaries, code edits."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._look_up(each) for each in wanted]

    def forget(self, run: str) -> None:
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
    """A proposer, and how many tokens it drafts for each run; none without a proposer."""

    def __init__(
        self, proposer: Proposer | None = None, most: int = 0, rows: int | None = None
    ) -> None:
        """`rows`: with more runs in a step nothing is drafted. None: no limit."""
        self._proposer = proposer
        self._rows = rows
        self.most = most if proposer is not None else 0
        self._lengths: dict[str, int] = {}
        self.tally = Tally()  # of the worker that drafts

    def draft(self, wanted: Sequence[Wanted], budget: int) -> dict[str, list[int]]:
        """Draft tokens by run, at most `budget` in all."""
        if self._proposer is None or (self._rows is not None and len(wanted) > self._rows):
            return {}
        asked = []
        for each in wanted:
            most = min(each.most, self._lengths.get(each.run, self.most), budget)
            if most > 0:
                asked.append(Wanted(each.run, each.token_ids, most))
                budget -= most
        found = self._proposer.propose(asked)
        return {each.run: draft for each, draft in zip(asked, found, strict=True) if draft}

    def update(self, run: str, *, drafted: int, accepted: int) -> None:
        """Adapt the length of the run's next draft: twice as long if all tokens were accepted, else one
        longer than what was accepted. A sequence that is hard to predict wastes one row a step."""
        if drafted:
            self.tally.draft(drafted, accepted)
            length = self._lengths.get(run, self.most)
            self._lengths[run] = min(self.most, 2 * length if accepted == drafted else accepted + 1)

    def forget(self, run: str) -> None:
        self._lengths.pop(run, None)
        if self._proposer is not None:
            self._proposer.forget(run)


def accepted_prefix(draft: Sequence[int], drawn: Sequence[int | None]) -> int:
    """How many draft tokens equal the drawn ones, up to the first that does not."""
    pairs = enumerate(zip(draft, drawn, strict=False))
    return next((i for i, (guess, token) in pairs if guess != token), len(draft))
