"""Pictures of the study of batching."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tools.lab.batching_findings import BURST, LOADS, STAGGERED, Cell
from tools.lab.plots import Bars, Panel, Series, draw_bars, draw_lines
from tools.lab.study import Picture
from tools.measure.slo import percentile


def pictures(folder: Path, sizes: Sequence[Cell], windows: Sequence[Cell]) -> tuple[Picture, ...]:
    """Latency against throughput by batch size; queueing by window."""
    trade, waits = folder / "batching-latency-throughput.png", folder / "batching-window.png"
    made = []
    burst, staggered = ([c for c in sizes if c.load == load] for load in LOADS)
    panels = [*([_burst(burst)] if burst else []), *([_staggered(staggered)] if staggered else [])]
    if panels:
        draw_lines(trade, panels)
        caption = (
            "Latency against throughput under a burst (the numbers at the points are batch sizes), "
            "and latency under staggered arrivals, which set the throughput themselves"
        )
        made.append(Picture(trade.name, caption))
    by_load = {load: {c.window_ms: c for c in windows if c.load == load} for load in LOADS}
    both = sorted(by_load[BURST].keys() & by_load[STAGGERED].keys())
    if both:
        bars = [
            Bars(load, [mean(by_load[load][window].queueing) for window in both]) for load in LOADS
        ]
        draw_bars(
            waits, [f"{w:g} ms" for w in both], bars, x="window", y="queueing of a request, mean ms"
        )
        made.append(Picture(waits.name, "What the window does to queueing"))
    return tuple(made)


def _burst(cells: Sequence[Cell]) -> Panel:
    cells = sorted(cells, key=lambda c: c.batch)
    lines = _lines([c.rate for c in cells], cells, [str(c.batch) for c in cells])
    return Panel("burst, by batch size", "throughput, tokens/s", "ms of a request", lines)


def _staggered(cells: Sequence[Cell]) -> Panel:
    cells = sorted(cells, key=lambda c: c.batch)
    lines = _lines([float(c.batch) for c in cells], cells, [])
    return Panel("staggered arrivals", "batch size", "ms of a request", lines, ticks=True)


def _lines(x: Sequence[float], cells: Sequence[Cell], labels: Sequence[str]) -> list[Series]:
    p95 = [percentile(c.total, 95) for c in cells]
    return [
        Series("latency, P95", x, p95, labels=labels, dashed=True),
        Series("latency, mean", x, [mean(c.total) for c in cells]),
        Series("execution, mean", x, [mean(c.execution) for c in cells]),
    ]
