"""Comparing arms that took turns: pure arithmetic, no clock and no model.

A round is one measurement of every arm, one right after the other. Arms are compared within rounds: the
ratio of two arms is the median of their ratios in each round, so a slow minute of the machine, which hits
both, cancels out.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PEER_MARGIN, ROOFLINE_SHARE = 1.1, 0.9


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm's tokens/s in each round of a cell, or its failure."""

    rates: tuple[float, ...] = ()
    failure: str = ""

    @property
    def median(self) -> float:
        """0 if it failed."""
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def best(self) -> float:
        """0 if it failed."""
        return max(self.rates, default=0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The goal of a cell, and what was reached."""

    peer: str  # the fastest peer, empty if none ran
    ratio: float  # ours to that peer, round by round; 0 without one
    share: float  # of the roofline, round by round
    goal: float  # tokens/s
    hit: bool


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """Median of the ratios within rounds; 0 without rounds."""
    pairs = list(zip(ours, other, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else 0.0


def judge(
    arms: Mapping[str, Arm], ours: str, rooflines: Sequence[float], own: Sequence[str]
) -> Verdict:
    """Judge a cell. The goal is the lower of 1.1 times the best peer and 90 % of the roofline of each
    round. `own`: our arms, which are not peers."""
    peers = {name: arm for name, arm in arms.items() if name not in own and arm.rates}
    peer = max(peers, key=lambda name: peers[name].median, default="")
    mine = arms[ours]
    goal = ROOFLINE_SHARE * statistics.median(rooflines)
    against, share = 0.0, ratio(mine.rates, rooflines)
    if peer:
        goal = min(goal, PEER_MARGIN * peers[peer].median)
        against = ratio(mine.rates, peers[peer].rates)
    hit = bool(mine.rates) and (against >= PEER_MARGIN or share >= ROOFLINE_SHARE)
    return Verdict(peer, against, share, goal, hit)


def same_start(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Length of the common prefix as a share of the shorter answer."""
    length = min(len(ours), len(theirs))
    pairs = enumerate(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), length)
    return first / length if length else 1.0
