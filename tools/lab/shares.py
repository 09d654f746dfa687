"""Shares: how much a count of requests can say. Pure.

A verdict needs FEWEST requests (or timed tokens) on each side. With fewer, the report gives the share
that was good enough and its Wilson interval, and leaves the verdict open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

from tools.lab.phrasing import number, percent

FEWEST = 50
"""Requests below which a cell gets no verdict: at 50, a 95% interval is up to 27 points wide."""

Z = 1.959964  # of a 95% interval


@dataclass(frozen=True, slots=True)
class Share:
    """`good` of `of` requests. Raises ValueError for counts that cannot be."""

    good: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.good <= self.of:
            raise ValueError(f"good must be 0 to {self.of}, got {self.good}")

    @property
    def value(self) -> float:
        """0 of no requests."""
        return self.good / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval, which holds for few requests and for shares near 0 and 1; (0, 1) of no
        requests."""
        if not self.of:
            return 0.0, 1.0
        n, p = self.of, self.value
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        low = 0.0 if self.good == 0 else max(0.0, middle - half)
        return low, 1.0 if self.good == self.of else min(1.0, middle + half)

    def apart(self, other: "Share") -> bool:
        """Whether the two intervals have nothing in common."""
        (low, high), (other_low, other_high) = self.interval, other.interval
        return low > other_high or other_low > high

    def __add__(self, other: "Share") -> "Share":
        return Share(self.good + other.good, self.of + other.of)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.good} of {self.of} ({percent(self.value)}; 95% interval {percent(low)} to "
            f"{percent(high)})"
        )


def shorter(values: Sequence[float], reference: Sequence[float]) -> Share:
    """How many of the values are shorter than the reference's median."""
    limit = median(reference)
    return Share(sum(each < limit for each in values), len(values))


def goodput(share: Share, rate: float) -> float:
    """Requests/s within the limits: the share of those that arrived in the window, times the rate at
    which they arrived. How long the last of them took changes nothing."""
    return share.value * rate


def basis(requests: int, rounds: int, window_s: float) -> str:
    """What a verdict rests on."""
    windows = f"{rounds} windows" if rounds != 1 else "1 window"
    return f"{requests} requests in {windows} of {number(window_s)} s"
