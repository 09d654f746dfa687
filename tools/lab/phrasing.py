"""Phrasing: changes, sizes, times and ratios as sentences write them. Pure."""

from collections.abc import Sequence
from math import isinf
from statistics import median

SAME = 0.05  # figures closer than this share count as the same


def change(before: float, after: float) -> str:
    """ "rose 3.40 times", "fell to 0.25 of it", "stayed the same"."""
    if before <= 0:
        return "stayed at zero" if after <= 0 else "rose from zero"
    ratio = after / before
    if abs(ratio - 1) <= SAME:
        return "stayed the same"
    if ratio < 0.01:
        return "fell below 0.01 of it"
    return f"rose {ratio:.2f} times" if ratio > 1 else f"fell to {ratio:.2f} of it"


def gigabytes(size: float) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def milliseconds(seconds: float) -> str:
    """Seconds as ms, with two or three significant digits."""
    ms = seconds * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def spread(ratios: Sequence[float]) -> str:
    """The median, and the range of the rounds."""
    if len(ratios) == 1:
        return times(ratios[0])
    return f"{times(median(ratios))} ({times(min(ratios))} .. {times(max(ratios))})"


def times(ratio: float) -> str:
    """A ratio."""
    return "∞" if isinf(ratio) else number(ratio)


def number(value: float) -> str:
    """Three significant digits. An infinite latency is that of a token that never came."""
    if isinf(value):
        return "never"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
