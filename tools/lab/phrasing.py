"""Phrasing: changes, sizes, times and ratios as sentences write them. Pure."""

from collections.abc import Sequence
from math import isinf
from statistics import median

SAME = 0.05  # two figures nearer to each other than this share are called the same


def change(before: float, after: float) -> str:
    """ "rose 3.40 times", "fell to 0.25 of it", "stayed the same"."""
    if before <= 0:
        return "stayed at nothing" if after <= 0 else "rose from nothing"
    ratio = after / before
    if abs(ratio - 1) <= SAME:
        return "stayed the same"
    if ratio < 0.01:
        return "fell to almost nothing"
    return f"rose {ratio:.2f} times" if ratio > 1 else f"fell to {ratio:.2f} of it"


def gigabytes(size: float) -> str:
    """A number of bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def milliseconds(seconds: float) -> str:
    """With as many digits as mean something."""
    ms = seconds * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def spread(ratios: Sequence[float]) -> str:
    """The median, and what the rounds said."""
    if len(ratios) == 1:
        return times(ratios[0])
    return f"{times(median(ratios))} ({times(min(ratios))} .. {times(max(ratios))})"


def times(ratio: float) -> str:
    """A ratio, for people."""
    return "∞" if isinf(ratio) else number(ratio)


def number(value: float) -> str:
    """Three digits, for people. A latency without end is that of a token that never came."""
    if isinf(value):
        return "never"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
