"""Pictures of the study of batching."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from lab.batching_findings import BURST, LOADS, Cell
from lab.plots import Bars, Panel, Series, draw_bars, draw_lines
from lab.study import Picture
from measure.slo import percentile


def pictures(folder: Path, sizes: Sequence[Cell], windows: Sequence[Cell]) -> tuple[Picture, ...]:
    """Latency against throughput by batch size; queueing by window."""
    trade, waits = folder / "batching-latency-throughput.png", folder / "batching-window.png"
    made = []
    if sizes:
        panels = [_panel(load, [c for c in sizes if c.load == load]) for load in LOADS]
        draw_lines(trade, panels)
        caption = "Latency against throughput; the numbers at the points are batch sizes"
        made.append(Picture(trade.name, caption))
    if windows:
        groups = [f"{c.window_ms:g} ms" for c in windows if c.load == BURST]
        bars = [Bars(load, [mean(c.queueing) for c in windows if c.load == load]) for load in LOADS]
        draw_bars(waits, groups, bars, x="window", y="queueing, mean ms")
        made.append(Picture(waits.name, "What the window costs in queueing"))
    return tuple(made)


def _panel(load: str, cells: Sequence[Cell]) -> Panel:
    cells = sorted(cells, key=lambda c: c.batch)
    x = [c.rate for c in cells]
    p95 = [percentile(c.total, 95) for c in cells]
    return Panel(
        load,
        "throughput, tokens/s",
        "ms",
        [
            Series("latency, P95", x, p95, dashed=True),
            Series("latency, mean", x, [mean(c.total) for c in cells],
                   labels=[str(c.batch) for c in cells]),
            Series("execution, mean", x, [mean(c.execution) for c in cells]),
        ],
    )  # fmt: skip
