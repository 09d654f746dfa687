"""Plain text tables, and numbers formatted for people."""

from collections.abc import Sequence
from math import ceil


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    first = widths[0]
    shown = [
        line[0].ljust(first)
        + "".join(
            f"  {cell.rjust(width)}" for cell, width in zip(line[1:], widths[1:], strict=True)
        )
        for line in lines
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([shown[0].rstrip(), rule, *(line.rstrip() for line in shown[1:])])


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted `values`, which must not be empty."""
    return values[max(0, ceil(percent / 100 * len(values)) - 1)]


def seconds(value: float) -> str:
    """A duration: 38 µs, 4.2 ms, 1.53 s, 2 min 5 s."""
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60)} s"
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 0.01:
        return f"{value * 1e3:.0f} ms"
    if value >= 0.001:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.0f} µs" if value else "0"


def amount(count: int) -> str:
    """A number of bytes: 512 B, 25.6 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
