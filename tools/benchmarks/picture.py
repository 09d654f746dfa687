"""Results of a benchmark on disk: NAME.json, and NAME.png where matplotlib is installed."""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click

COLOURS = {"ours": "#1b6ca8", "ours P/D": "#67a9cf", "transformers": "#b0b0b0"}
OTHERS = ("#d95f02", "#7570b3", "#66a61e", "#e7298a")


def save(folder: Path, name: str, found: Mapping[str, Any], draw: Callable[[Path], None]) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if find_spec("matplotlib") is None:
        click.echo("the picture needs matplotlib: pip install matplotlib")
    else:
        draw(folder / f"{name}.png")


def _pyplot() -> Any:
    """Imported late: matplotlib is optional."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_engine(records: list[dict[str, Any]], path: Path) -> None:
    """One panel per shape and dtype, one group of bars per cell, as a share of the roofline."""
    plt = _pyplot()
    kinds = list(dict.fromkeys((r["cell"]["shape"], r["cell"]["dtype"]) for r in records))
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(9, 2.6 * len(kinds)), squeeze=False, layout="constrained"
    )
    names = list(records[0]["arms"])
    spare = iter(OTHERS)
    colours = {name: COLOURS.get(name) or next(spare) for name in names}
    for axis, (shape, dtype) in zip(axes[:, 0], kinds, strict=True):
        cells = [r for r in records if (r["cell"]["shape"], r["cell"]["dtype"]) == (shape, dtype)]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            for x, record in enumerate(cells):
                rates = record["arms"][name]["rates"]
                if not rates:
                    continue
                share = 100 * median(rates) / record["roofline"]
                place = x + (i - (len(names) - 1) / 2) * width
                label = name if x == 0 else None
                axis.bar(place, share, width * 0.92, color=colours[name], label=label)
                text = f"{median(rates):,.0f}"
                axis.text(place, share + 1.5, text, ha="center", fontsize=7)
        axis.axhline(100, color="#404040", linewidth=0.8)
        axis.set_xticks(range(len(cells)), [_name(record["cell"]["batch"]) for record in cells])
        axis.set_ylabel("% of roofline")
        axis.set_title(f"{shape}, {dtype} (numbers: tokens/s)", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=len(names), loc="upper right")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _name(batch: int) -> str:
    return f"decode, batch {batch}" if batch else "prefill 1x512"


def draw_disagg(results: dict[str, dict[str, list[Any]]], path: Path) -> None:
    """One column per load: p99 TTFT, p99 ITL and goodput of each arm, the rounds as dots."""
    plt = _pyplot()
    rows = (("ttft_p99", "TTFT p99, ms"), ("itl_p99", "ITL p99, ms"), ("goodput", "goodput, 1/s"))
    figure, axes = plt.subplots(
        len(rows),
        len(results),
        figsize=(3.1 * len(results) + 0.6, 7.0),
        squeeze=False,
        layout="constrained",
    )
    colours = ("#1b6ca8", "#d95f02", "#7570b3")
    for column, (load, arms) in enumerate(results.items()):
        for row, (figure_, label) in enumerate(rows):
            axis = axes[row, column]
            for x, (name, rounds) in enumerate(arms.items()):
                values = [getattr(each, figure_) for each in rounds]
                colour = colours[x % len(colours)]
                axis.bar(x, median(values), width=0.7, color=colour, label=name)
                axis.plot([x] * len(values), values, "o", color="#202020", markersize=2.5)
            axis.set_xticks([])
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
            if row == 0:
                axis.set_title(load, fontsize=9, loc="left")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
