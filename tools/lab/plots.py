"""Plots: the pictures of the studies. PNG, on a light ground."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tools.lab.batching_findings import BURST, LOADS, STAGGERED, Cell
from tools.lab.claims_findings import CLAIMS, Result, Verdict, verdict
from tools.lab.disagg_findings import TOGETHER_MS, WAYS, Handed, Rounds, grouped, shares_of
from tools.lab.disagg_plan import Pace
from tools.lab.kv_findings import Point
from tools.lab.phrasing import number
from tools.lab.study import Picture
from tools.measure.slo import Slo, Trace, percentile
from tools.measure.split import CHUNKED, COLOCATED, PD

DPI = 130
COLOURS = ("#1b6ca8", "#d95f02", "#4d9221", "#7570b3", "#e7298a", "#404040")
VERDICT_COLOURS = {
    Verdict.BEATEN: "#1b7f5c",
    Verdict.REPRODUCED: "#1b6ca8",
    Verdict.NOT: "#c1440e",
    Verdict.FEW: "#8a8a8a",
}
CLAIMED = "#d9d2c0"
ARM_COLOURS = {PD: "#1b6ca8", COLOCATED: "#d95f02", CHUNKED: "#7570b3"}
MARKS = {"shm": "o", "pinned": "s", "frames": "^"}
LOG = "log scale"
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


@dataclass(frozen=True, slots=True)
class Series:
    """A line. `labels` stand above its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; their names have units."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log: bool = False  # both axes
    ticks: bool = False  # on the x axis at the points alone: they are settings, not measurements


def draw_lines(path: Path, panels: Sequence[Panel]) -> None:
    """The panels beside each other."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.0), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, panel)
    _save(figure, path)


def _draw(axis: Any, panel: Panel) -> None:
    for place, each in enumerate(panel.series):
        colour = COLOURS[place % len(COLOURS)]
        style = "--" if each.dashed else "-"
        axis.plot(each.x, each.y, style, marker="o", markersize=4, color=colour, label=each.name)
        for x, y, label in zip(each.x, each.y, each.labels, strict=False):
            axis.annotate(
                label, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
            )
    if not panel.log:
        axis.margins(x=0.08, y=0.12)
        axis.set_ylim(bottom=0)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    if panel.log:
        logarithmic_x(axis, base=2)
        logarithmic_y(axis)
    if panel.ticks:
        ticks = sorted({x for each in panel.series for x in each.x})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_title(panel.title, loc="left", fontsize=10)
    axis.grid(color="#e5e5e5", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def draw_stages(path: Path, ms: Mapping[str, float]) -> None:
    """Bars by name, the number behind each; logarithmic, for stages lie decades apart."""
    figure, axis = plt.subplots(figsize=(7.2, 0.38 * len(ms) + 1.0), layout="constrained")
    names = list(ms)[::-1]
    values = [ms[name] for name in names]
    axis.barh(names, values, color=COLOURS[0], height=0.65)
    for place, value in enumerate(values):
        axis.annotate(
            number(value), (value, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axis.set_xlabel("ms of one request")
    logarithmic_x(axis)
    axis.xaxis.set_major_locator(
        LogLocator(numticks=14)
    )  # over so many decades others have no room
    axis.set_xlim(min((v for v in values if v > 0), default=1.0) / 3, max(*values, 1.0) * 5)
    axis.xaxis.set_major_formatter(PLAIN)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@dataclass(frozen=True, slots=True)
class Bars:
    """A panel of bars: one value for each group."""

    title: str
    values: Sequence[float]


def draw_bars(path: Path, groups: Sequence[str], panels: Sequence[Bars], *, x: str, y: str) -> None:
    """Panels beside each other, each with a scale of its own; the numbers stand above the bars."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, panel, colour in zip(axes[0], panels, COLOURS, strict=False):
        axis.bar(groups, panel.values, width=0.55, color=colour)
        for place, value in enumerate(panel.values):
            axis.annotate(
                number(value), (place, value), xytext=(0, 2), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def batching_pictures(
    folder: Path, sizes: Sequence[Cell], windows: Sequence[Cell]
) -> tuple[Picture, ...]:
    """Latency against throughput by batch size; queueing by window."""
    trade, waits = folder / "batching-latency-throughput.png", folder / "batching-window.png"
    made = []
    burst, staggered = ([c for c in sizes if c.load == load] for load in LOADS)
    panels = [
        *([_burst_panel(burst)] if burst else []),
        *([_staggered_panel(staggered)] if staggered else []),
    ]
    if panels:
        draw_lines(trade, panels)
        caption = (
            "Latency against throughput under a burst (the numbers at the points are batch sizes), "
            "and latency under staggered arrivals, which set the throughput themselves (all axes linear)"
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
        made.append(
            Picture(
                waits.name,
                "What the window does to queueing (linear, each load on a scale of its own)",
            )
        )
    return tuple(made)


def _burst_panel(cells: Sequence[Cell]) -> Panel:
    cells = sorted(cells, key=lambda c: c.batch)
    lines = _latency_lines([c.rate for c in cells], cells, [str(c.batch) for c in cells])
    return Panel("burst, by batch size", "throughput, tokens/s", "ms of a request", lines)


def _staggered_panel(cells: Sequence[Cell]) -> Panel:
    cells = sorted(cells, key=lambda c: c.batch)
    lines = _latency_lines([float(c.batch) for c in cells], cells, [])
    return Panel("staggered arrivals", "batch size", "ms of a request", lines, ticks=True)


def _latency_lines(
    x: Sequence[float], cells: Sequence[Cell], labels: Sequence[str]
) -> list[Series]:
    p95 = [percentile(c.total, 95) for c in cells]
    return [
        Series("latency, P95", x, p95, labels=labels, dashed=True),
        Series("latency, mean", x, [mean(c.total) for c in cells]),
        Series("execution, mean", x, [mean(c.execution) for c in cells]),
    ]


def kv_cache_picture(folder: Path, points: Sequence[Point]) -> Picture:
    """Prompt length against latency, with and without the cache."""
    path = folder / "kv-cache-latency.png"
    kinds = {"without the cache": False, "with the cache": True}
    panels = []
    for title, y, value in (
        ("a new token", "mean ms of a token", lambda p: 1e3 * p.token_s),
        ("the whole answer", "ms, prefill included", lambda p: 1e3 * p.total_s),
    ):
        lines = []
        for name, use in kinds.items():
            here = sorted((p for p in points if p.use_kv_cache is use), key=lambda p: p.prompt_len)
            lines.append(Series(name, [p.prompt_len for p in here], [value(p) for p in here]))
        panels.append(Panel(title, "prompt tokens", y, lines, log=True, ticks=True))
    draw_lines(path, panels)
    caption = "Prompt length against latency, with and without the cache (both axes logarithmic)"
    return Picture(path.name, caption)


def draw_claims(results: Mapping[str, Result], path: Path) -> None:
    """A line for each claim: the claimed range as a band, the median as a bar, rounds as dots."""
    height = 0.62 * len(CLAIMS) + 1.5
    figure, axis = plt.subplots(figsize=(9.2, height), layout="constrained")
    ratios = [each for result in results.values() for each in result.ratios]
    ends = [claim.high for claim in CLAIMS if not isinf(claim.high)]
    left, right = min([0.8, *(0.85 * each for each in ratios)]), 1.35 * max([*ends, *ratios])
    margin = axis.get_yaxis_transform()
    for y, claim in enumerate(CLAIMS):
        high = right if isinf(claim.high) else claim.high
        axis.barh(y + 0.24, high - claim.low, left=claim.low, height=0.34, color=CLAIMED)
        result = results.get(claim.key)
        if result is None:
            axis.text(1.01, y - 0.16, "not measured", transform=margin, va="center", fontsize=8.5)
            continue
        found = verdict(claim, result)
        axis.barh(y - 0.16, result.ratio - 1, left=1, height=0.42, color=VERDICT_COLOURS[found])
        axis.plot(result.ratios, [y - 0.16] * len(result.ratios), "o", color="#202020", ms=2.6)
        label = f"{number(result.ratio)} times: {found}"
        axis.text(1.01, y - 0.16, label, transform=margin, va="center", fontsize=8.5)
    axis.axvline(1, color="#404040", lw=0.9)
    axis.set_xlabel("times better than without; 1 is no difference")
    logarithmic_x(axis)
    axis.set_xlim(left, right)
    axis.set_yticks(range(len(CLAIMS)), [claim.title for claim in CLAIMS])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=CLAIMED, label="claimed")]
    handles += [
        Patch(color=colour, label=f"measured: {name}") for name, colour in VERDICT_COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    _save(figure, path)


def draw_interference(traces: Mapping[str, Sequence[Trace]], pace: Pace, path: Path) -> None:
    """A panel for each arm: each token's gap against the clock, and when long prompts arrived."""
    arms = list(traces)
    figure, axes = plt.subplots(
        len(arms), 1, figsize=(8.6, 2.1 * len(arms) + 0.9), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, arm in zip(axes[:, 0], arms, strict=True):
        streams = [each for each in traces[arm] if each.watched]
        points = [p for each in streams for p in zip(each.tokens[1:], each.gaps, strict=True)]
        counted = [1e3 * gap for at, gap in points if pace.first <= at <= pace.end]
        axis.plot(
            [at for at, _ in points], [max(TOGETHER_MS, 1e3 * gap) for _, gap in points], ".",
            markersize=2.6, color=ARM_COLOURS[arm], rasterized=True,
        )  # fmt: skip
        for i, prompt in enumerate(each for each in traces[arm] if not each.watched):
            label = "a long prompt arrives" if i == 0 else None
            axis.axvline(prompt.intended, color="#404040", lw=0.9, ls="--", label=label)
        label = f"p99 {number(percentile(counted, 99))} ms, longest {number(max(counted, default=0))} ms"
        axis.set_title(f"{arm}: {label}", loc="left", fontsize=9.5)
        axis.set_ylabel("gap, ms")
        logarithmic_y(axis)
        _tidy(axis)
    axes[0, 0].set_xlim(0, pace.end + 0.2)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[-1, 0].set_xlabel("time since the streams began, s")
    _save(figure, path)


def draw_rates(
    results: Mapping[float, Mapping[str, Rounds]], slo: Slo, capacity: float | None, path: Path
) -> None:
    """TTFT, ITL and the share within the SLO against arrival rate: medians of the rounds as lines, rounds
    as dots; the share over all rounds, with its interval."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    arms = list(dict.fromkeys(arm for its in results.values() for arm in its))
    times = (("TTFT, ms", "ttft", 1e3 * slo.ttft_s), ("ITL, ms", "itl", 1e3 * slo.itl_s))
    for axis, (label, key, limit) in zip(axes, times, strict=False):
        for arm in arms:
            _rate_line(axis, results, arm, f"{key}_p50", "-")
            _rate_line(axis, results, arm, f"{key}_p99", "--")
        axis.axhline(limit, color="#404040", lw=0.9, ls=":")
        axis.annotate(
            "SLO", (0.01, limit), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
        )
        axis.set_ylabel(label)
        logarithmic_y(axis)
    for place, arm in enumerate(arms):
        _share_line(axes[2], results, arm, beside=(place - 1) * 0.01 * max(results))
    axes[2].set_ylim(0, 103)
    axes[2].set_ylabel("requests within the SLO, % (linear)")
    for axis in axes:
        axis.set_xlim(left=0)
        axis.set_xlabel("requests that arrive a second")
        _tidy(axis)
    axes[0].plot([], [], color="#404040", ls="-", label="p50, share")
    axes[0].plot([], [], color="#404040", ls="--", label="p99")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    if capacity is not None:
        figure.suptitle(
            f"a colocated cluster completes {number(capacity)} requests/s when all come at once",
            fontsize=9.5, x=0.01, ha="left",
        )  # fmt: skip
    _save(figure, path)


def _share_line(
    axis: Any, results: Mapping[float, Mapping[str, Rounds]], arm: str, *, beside: float
) -> None:
    """`beside`: how far the arm stands to the right, so that intervals do not hide each other."""
    points = [
        (rate, share)
        for rate, arms in sorted(results.items())
        if (share := shares_of(arms).get(arm)) is not None
    ]
    values = [100 * share.value for _, share in points]
    ends = [[100 * end for end in share.interval] for _, share in points]
    down = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    up = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    axis.errorbar(
        [rate + beside for rate, _ in points], values, yerr=[down, up], color=ARM_COLOURS[arm],
        lw=1.6, marker=".", capsize=3, elinewidth=0.9,
    )  # fmt: skip


def _rate_line(
    axis: Any, results: Mapping[float, Mapping[str, Rounds]], arm: str, key: str, style: str
) -> None:
    points = [
        (rate, [each[key] for each in arms[arm].values()])
        for rate, arms in sorted(results.items())
        if arms.get(arm)
    ]
    label = arm if style == "-" else None
    rates, middles = [rate for rate, _ in points], [median(values) for _, values in points]
    axis.plot(rates, middles, style, color=ARM_COLOURS[arm], lw=1.6, label=label)
    for rate, values in points:
        axis.plot([rate] * len(values), values, ".", color=ARM_COLOURS[arm], markersize=5)


def draw_handover(handed: Sequence[Handed], path: Path) -> None:
    """ms against prompt length, a line for each transport."""
    figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
    groups = grouped(handed)
    for transport in dict.fromkeys(each.transport for each in handed):
        its = sorted((n, [e.ms for e in each]) for (t, n), each in groups.items() if t == transport)
        lengths = [n for n, _ in its]
        axis.plot(
            lengths, [median(ms) for _, ms in its],
            marker=MARKS[transport], markersize=4.5, lw=1.6, label=WAYS[transport],
        )  # fmt: skip
        low, high = [min(ms) for _, ms in its], [max(ms) for _, ms in its]
        axis.fill_between(lengths, low, high, alpha=0.18, lw=0)
    axis.set_xlabel("prompt, tokens")
    axis.set_ylabel("hand-over, ms")
    logarithmic_x(axis, base=2)
    logarithmic_y(axis)
    axis.set_xticks(sorted({each.prompt for each in handed}))
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8.5)
    _tidy(axis)
    _save(figure, path)


def logarithmic_x(axis: Any, base: int = 10) -> None:
    """Makes the axis logarithmic, and its label says so. The label must be set before."""
    axis.set_xscale("log", base=base)
    axis.set_xlabel(f"{axis.get_xlabel()} ({LOG})")
    _ticks(axis.xaxis)


def logarithmic_y(axis: Any) -> None:
    """As logarithmic_x."""
    axis.set_yscale("log")
    axis.set_ylabel(f"{axis.get_ylabel()} ({LOG})")
    _ticks(axis.yaxis)


def _ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as people write them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=14))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e4e4", lw=0.6)
    axis.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)
