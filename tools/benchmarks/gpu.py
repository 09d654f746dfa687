"""The GPU benchmark, section by section. A failing section is recorded and the rest goes on.

    tools/benchmarks/gpu.sh                                     # on the machine with the card
    python -m tools.benchmarks.gpu --device cpu --quick   # the same code, anywhere

Decode (with and without CUDA graphs) and prefill of the engine with random weights, as a share of the
bandwidth and matrix rate measured in the same run, against transformers' generate and its continuous
batching. Then two processes on one GPU: hand-over by CUDA IPC, and what it adds to the first token. Each
section has a process of its own, so a CUDA error ends with it and its memory is freed. All sections
together end within --budget seconds; those left out are recorded.
"""

import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from baton.engine.device import describe_device, pick_device
from baton.errors import InputError
from baton.package import ROOT
from baton.table import table
from tools.benchmarks import gpu_sections as sections
from tools.benchmarks.gpu_sections import REASONS, Cell, Plan, reason
from tools.benchmarks.gpu_triton import attention

SHAPES = ("gpt2-8k", "qwen2-0.5b", "qwen2-7b")
Found = dict[str, Any]


def full(device: torch.device) -> Plan:
    """The sizes of a full session."""
    return Plan(device, "auto", (1, 8, 64, 256), (2048, 8192), 512, 20, 34, 8192,
                ("random:qwen2-0.5b", 2048), 64.0)  # fmt: skip


def quick(device: torch.device) -> Plan:
    """Small sizes, to see that it runs."""
    return Plan(device, "auto", (1, 2), (64,), 32, 2, 4, 256, ("demo", 64), 1.0)


def all_sections(plan: Plan, models: list[str]) -> dict[str, Callable[[], Iterator[Cell]]]:
    """Sections by name, the most important first."""
    found: dict[str, Callable[[], Iterator[Cell]]] = {"limits": partial(sections.limits, plan)}
    for model in models:
        found[f"engine {model}"] = partial(sections.engine, plan, model)
    if plan.device.type == "cuda":
        found["attention"] = partial(attention, plan)
    found["hand-over"] = partial(sections.handover, plan)
    found["first token"] = partial(sections.first_token, plan)
    for model in models:
        found[f"transformers {model}"] = partial(sections.transformers, plan, model)
    if plan.device.type == "cuda":
        fewer = Plan(plan.device, "fp8", plan.batches[:3], plan.prefills[:1], plan.context,
                     plan.rounds, plan.new, plan.matrix, plan.first_token, plan.megabytes)  # fmt: skip
        found[f"fp8 {models[-1]}"] = partial(sections.engine, fewer, models[-1])
    return found


class Report:
    """The sections, the results of their cells, and their failures."""

    def __init__(self) -> None:
        self.sections: dict[str, Found] = {}

    def section(self, name: str, run: Callable[[], Iterator[Cell]]) -> None:
        """Run a section in this process. A failure ends it and is recorded with the cells before it."""
        begun, cells, failure = time.perf_counter(), {}, None
        try:
            for cell, found in run():
                cells[cell] = found
                click.echo(f"{cell}: {described(found)}")
        except REASONS as error:
            failure = reason(error)
        self.record(name, cells, failure, time.perf_counter() - begun)

    def process(self, name: str, command: list[str], seconds: float) -> None:
        """Run a section in a process that prints its cells as JSON lines, for `seconds` at most."""
        begun, cells, failure = time.monotonic(), {}, None
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout is not None
            for line in lines_until(child.stdout.fileno(), begun + seconds):
                message = json.loads(line)
                if "failure" in message:
                    failure = message["failure"]
                else:
                    cells[message["cell"]] = message["found"]
                    click.echo(f"{message['cell']}: {described(message['found'])}")
            try:
                child.wait(max(0.0, begun + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                failure = f"not done after {seconds:.0f} s"
                child.kill()
        if failure is None and child.returncode:
            failure = f"its process ended with {child.returncode}"
        self.record(name, cells, failure, time.monotonic() - begun)

    def record(self, name: str, cells: Found, failure: str | None, took: float) -> None:
        """Record a section as it is stored in the file."""
        self.sections[name] = {"cells": cells, "took_s": round(took, 1)}
        if failure is not None:
            self.sections[name]["failure"] = failure
            click.echo(f"{name} FAILED: {failure}")

    def lines(self) -> list[list[str]]:
        """Rows of the table: cells with a time, and their share of the limit if known."""
        top = self.sections.get("limits", {}).get("cells", {}).get("limits")
        found = []
        for section in self.sections.values():
            for name, cell in section["cells"].items():
                if "ms" in cell:
                    rate = f"{cell['tokens/s']:,.0f}" if "tokens/s" in cell else ""
                    found.append([name, f"{cell['ms']:.2f}", rate, share(cell, top)])
        return found


def share(cell: Found, top: Found | None) -> str:
    """The time at the card's limits as a share of the time it took."""
    if top is None or not cell.get("flops"):
        return ""
    seconds = max(cell["bytes"] / (top["GB/s"] * 1e9), cell["flops"] / (top["TFLOP/s"] * 1e12))
    return f"{1e3 * seconds / cell['ms']:.0%}"


def described(found: Found) -> str:
    """The result in one line, without the counts for the limit."""
    shown = {key: f"{each:.4g}" if isinstance(each, float) else each for key, each in found.items()}
    return ", ".join(
        f"{key} {each}" for key, each in shown.items() if key not in ("bytes", "flops")
    )


def lines_until(source: int, deadline: float) -> Iterator[bytes]:
    """Lines of a pipe until it ends or the deadline (monotonic) passes."""
    rest = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([source], [], [], left)[0]:
            return
        piece = os.read(source, 65536)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def speak(name: str, run: Callable[[], Iterator[Cell]]) -> None:
    """The child's side of Report.process."""
    try:
        for cell, found in run():
            click.echo(json.dumps({"cell": cell, "found": found}))
    except REASONS as error:
        click.echo(json.dumps({"failure": reason(error)}))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True)
@click.option("--quick", "is_quick", is_flag=True, help="Small numbers, to see that it runs.")
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Only sections whose names begin with TEXT."
)
@click.option("--budget", default=540.0, show_default=True, help="Seconds for all sections.")
@click.option("--in-process", is_flag=True, help="Run sections in this process, for debugging.")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="Folder.")
@click.option("--speak", "speaks", hidden=True, default=None)
def main(
    device: str, shapes: tuple[str, ...], is_quick: bool, only: tuple[str, ...], budget: float,
    in_process: bool, output: Path | None, speaks: str | None,
) -> None:  # fmt: skip
    """Engine and hand-over on a GPU."""
    begun = time.monotonic()
    try:
        place = pick_device(device)
    except InputError as error:
        raise click.ClickException(str(error)) from error
    plan = quick(place) if is_quick else full(place)
    models = ["demo"] if is_quick else [f"random:{shape}" for shape in shapes]
    wanted = all_sections(plan, models)
    if speaks is not None:
        return speak(speaks, wanted[speaks])
    about = {"device": describe_device(place), "torch": torch.__version__,
             "python": platform.python_version(), "command": sys.argv[1:]}  # fmt: skip
    click.echo(str(about))
    report = Report()
    same = [
        sys.executable,
        "-m",
        "tools.benchmarks.gpu",
        "--device",
        device,
        *["--quick"] * is_quick,
    ]
    same += [part for shape in shapes for part in ("--shape", shape)]
    for name, run in wanted.items():
        left = begun + budget - time.monotonic()
        if only and not name.startswith(only):
            continue
        if left < 1:
            report.record(name, {}, "no time was left", 0.0)
        elif in_process:
            report.section(name, run)
        else:
            report.process(name, [*same, "--speak", name], left)
        if output is not None:  # after each section: an interrupted session keeps what it has
            output.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"about": about, "sections": report.sections}, indent=1)
            (output / "gpu.json").write_text(text + "\n")
    click.echo("\n" + table(["", "ms", "tokens/s", "of the limit"], report.lines()))


if __name__ == "__main__":
    main(prog_name="python -m tools.benchmarks.gpu")
