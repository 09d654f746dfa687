"""Tally: what a worker has computed since its process began, for its heartbeats. It only adds integers,
so counting costs nothing beside a forward."""

from bisect import bisect_left

from baton.wire.records import FORWARD_TOKENS, Work


class Tally:
    """Counts forwards and drafts. A new epoch, or a new router, does not begin it anew."""

    def __init__(self) -> None:
        self._forwards = [0] * (len(FORWARD_TOKENS) + 1)
        self._tokens = 0
        self._drafts = self._draft_tokens = 0
        self._accepted: list[int] = []

    def forward(self, tokens: int) -> None:
        """One forward has computed so many tokens."""
        self._forwards[bisect_left(FORWARD_TOKENS, tokens)] += 1
        self._tokens += tokens

    def draft(self, drafted: int, accepted: int) -> None:
        """Of a draft of so many tokens the first `accepted` were."""
        self._drafts += 1
        self._draft_tokens += drafted
        self._accepted += [0] * (drafted - len(self._accepted))
        for place in range(accepted):
            self._accepted[place] += 1

    def report(self) -> Work | None:
        """All of it, as totals; None before the first forward."""
        if not self._tokens:
            return None
        accepted = tuple(self._accepted)
        return Work(tuple(self._forwards), self._tokens, self._drafts, self._draft_tokens, accepted)
