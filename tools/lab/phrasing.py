"""Phrasing: numbers, changes, sizes, times and ratios as reports write them. Pure."""

from collections.abc import Sequence
from math import isinf, isnan
from statistics import median

SAME = 0.05  # figures closer than this share count as the same


def change(before: float, after: float) -> str:
    """ "rose 3.40 times", "fell to 0.250 of it", "stayed the same"."""
    if before <= 0:
        return "stayed at zero" if after <= 0 else "rose from zero"
    ratio = after / before
    if abs(ratio - 1) <= SAME:
        return "stayed the same"
    if ratio < 0.01:
        return "fell below 0.01 of it"
    return f"rose {number(ratio)} times" if ratio > 1 else f"fell to {number(ratio)} of it"


def gigabytes(size: float) -> str:
    """Bytes as kB, MB or GB."""
    unit, bytes_ = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e6 else ("kB", 1e3)
    return f"{number(size / bytes_)} {unit}"


def milliseconds(seconds: float) -> str:
    """Seconds as ms."""
    return f"{number(1e3 * seconds)} ms"


def spread(ratios: Sequence[float]) -> str:
    """The median, and the range of the rounds."""
    if len(ratios) == 1:
        return times(ratios[0])
    return f"{times(median(ratios))} ({times(min(ratios))} .. {times(max(ratios))})"


def times(ratio: float) -> str:
    """A ratio."""
    return "∞" if isinf(ratio) else number(ratio)


def number(value: float) -> str:
    """Three significant digits, which is what a measurement here is good for: 1,450, 56.8, 0.123. All
    measured numbers of reports and pictures are written by this function. An infinite latency is that of
    a token that never came."""
    if isinf(value):
        return "never"
    if isnan(value):
        return "-"
    if value == 0:
        return "0"
    power = int(f"{value:.2e}".partition("e")[2])  # after rounding: 9.996 is 10.0
    if power < -4:
        return f"{value:.2e}"
    return f"{round(value, 2 - power):,.{max(0, 2 - power)}f}"


def percent(share: float) -> str:
    """A share, with at most three significant digits: 5%, 87.5%, 100%."""
    if 0 < share < 1e-4:
        return "below 0.01%"
    text = number(100 * share)
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
