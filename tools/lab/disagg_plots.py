"""Pictures of the disaggregation study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tools.lab.disagg_cells import TOGETHER_MS, Rounds, number
from tools.lab.disagg_handed import WAYS, Handed, grouped
from tools.lab.disagg_plan import CHUNKED, COLOCATED, PD, Pace
from tools.measure.slo import Slo, Trace, percentile

COLOURS = {PD: "#1b6ca8", COLOCATED: "#d95f02", CHUNKED: "#7570b3"}
MARKS = {"shm": "o", "pinned": "s", "frames": "^"}
DPI = 130
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


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
            markersize=2.6, color=COLOURS[arm], rasterized=True,
        )  # fmt: skip
        for i, prompt in enumerate(each for each in traces[arm] if not each.watched):
            label = "a long prompt arrives" if i == 0 else None
            axis.axvline(prompt.intended, color="#404040", lw=0.9, ls="--", label=label)
        said = f"p99 {number(percentile(counted, 99))} ms, longest {number(max(counted, default=0))} ms"
        axis.set_title(f"{arm}: {said}", loc="left", fontsize=9.5)
        axis.set_yscale("log")
        axis.set_ylabel("gap, ms")
        _tidy(axis)
    axes[0, 0].set_xlim(0, pace.end + 0.2)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[-1, 0].set_xlabel("time since the streams began, s")
    _logarithmic(axes[-1, 0].yaxis)
    _save(figure, path)


def draw_rates(
    results: Mapping[float, Mapping[str, Rounds]], slo: Slo, capacity: float | None, path: Path
) -> None:
    """TTFT, ITL and goodput against arrival rate: medians of the rounds as lines, rounds as dots."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    panels: tuple[tuple[str, tuple[tuple[str, str], ...], float | None], ...] = (
        ("TTFT, ms", (("ttft_p50", "-"), ("ttft_p99", "--")), 1e3 * slo.ttft_s),
        ("ITL, ms", (("itl_p50", "-"), ("itl_p99", "--")), 1e3 * slo.itl_s),
        ("requests/s within the SLO", (("goodput", "-"),), None),
    )
    for axis, (label, lines, limit) in zip(axes, panels, strict=True):
        for arm in dict.fromkeys(arm for arms in results.values() for arm in arms):
            for key, style in lines:
                _line(axis, results, arm, key, style)
        if limit is not None:
            axis.axhline(limit, color="#404040", lw=0.9, ls=":")
            axis.annotate(
                "SLO", (0.01, limit), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
            )
            axis.set_yscale("log")
            _logarithmic(axis.yaxis)
        else:
            top = max(results)
            axis.plot([0, top], [0, top], color="#b0b0b0", lw=0.9, ls=":")
            axis.annotate("all that arrive", (top, top), ha="right", va="bottom", fontsize=8)
            axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set_xlabel("requests that arrive a second")
        axis.set_ylabel(label)
        _tidy(axis)
    axes[0].plot([], [], color="#404040", ls="-", label="p50, goodput")
    axes[0].plot([], [], color="#404040", ls="--", label="p99")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    if capacity is not None:
        figure.suptitle(
            f"a colocated cluster completes {number(capacity)} requests/s when all come at once",
            fontsize=9.5, x=0.01, ha="left",
        )  # fmt: skip
    _save(figure, path)


def _line(
    axis: Any, results: Mapping[float, Mapping[str, Rounds]], arm: str, key: str, style: str
) -> None:
    points = [
        (rate, [each[key] for each in arms[arm].values()])
        for rate, arms in sorted(results.items())
        if arms.get(arm)
    ]
    label = arm if style == "-" else None
    rates, middles = [rate for rate, _ in points], [median(values) for _, values in points]
    axis.plot(rates, middles, style, color=COLOURS[arm], lw=1.6, label=label)
    for rate, values in points:
        axis.plot([rate] * len(values), values, ".", color=COLOURS[arm], markersize=5)


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
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted({each.prompt for each in handed}))
    axis.minorticks_off()
    axis.xaxis.set_major_formatter(PLAIN)
    _logarithmic(axis.yaxis)
    axis.set_xlabel("prompt, tokens")
    axis.set_ylabel("hand-over, ms (median; fastest to slowest shaded)")
    axis.legend(frameon=False, fontsize=8.5)
    _tidy(axis)
    _save(figure, path)


def _logarithmic(axis: Any) -> None:
    """1, 2, 5, 10, ... as people write them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=14))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e4e4", lw=0.6)
    axis.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
