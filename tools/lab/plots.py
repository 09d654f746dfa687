"""Plots: the few kinds of pictures that the studies draw. PNG, on a light ground."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#1b6ca8", "#d95f02", "#4d9221", "#7570b3", "#e7298a", "#404040")
DPI = 130


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `labels` stand above its points;"""

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
    for number, each in enumerate(panel.series):
        colour = COLOURS[number % len(COLOURS)]
        style = "--" if each.dashed else "-"
        axis.plot(each.x, each.y, style, marker="o", markersize=4, color=colour, label=each.name)
        for x, y, label in zip(each.x, each.y, each.labels, strict=False):
            axis.annotate(
                label, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
            )
    if panel.log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axis.margins(x=0.08, y=0.12)
        axis.set_ylim(bottom=0)
    if panel.ticks:
        ticks = sorted({x for each in panel.series for x in each.x})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
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
            f"{value:,.2f}", (value, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axis.set_xlabel("ms of one request (logarithmic)")
    axis.set_xscale("log")
    axis.set_xlim(min((v for v in values if v > 0), default=1.0) / 3, max(*values, 1.0) * 5)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
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
            text = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
            axis.annotate(
                text, (place, value), xytext=(0, 2), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)
