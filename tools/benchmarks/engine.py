"""`python main.py bench engine`: our engine against every installed peer and this machine's limits.

A cell is a shape, a dtype and a task: decode of 1, 4, 16 or 64 prompts of 64 tokens to 100 new ones each,
in tokens/s of the whole call with prefill; or prefill of one prompt of 512 tokens. In every cell the arms
take turns, round by round, and each round measures the machine's limits too. Random weights, greedy, EOS
ignored.

--cpu-time counts the CPU seconds of the arm's process instead of the time that passes: on a shared
machine they vary less. Threads that wait for each other count too, so use it with --threads 1. The limits
remain those of the time that passes.
"""

import os
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from baton.engine.loading import load_model
from baton.model_files import resolve_model
from baton.package import ROOT
from baton.table import table
from baton.topology import usable_cores
from tools.benchmarks.arms import ARMS
from tools.benchmarks.child import Child
from tools.benchmarks.compare import Arm, judge, same_start
from tools.benchmarks.peers.__main__ import HOME, PACKAGES, python_of
from tools.benchmarks.picture import draw_engine, save
from tools.measure.limits import Limits, Meter, Work
from tools.measure.shape import required_shape

PEERS = Path(__file__).parent / "peers"
OURS = ("ours", "ours P/D")
PROMPT, PREFILL = 64, 512
DTYPES = ("float32", "bfloat16", "int8")
SPIN = {"GOMP_SPINCOUNT": "1000"}  # as our workers set it for themselves (baton/cluster/launch.py)
CHECKED = 16  # tokens of the first answers that are compared with transformers'


def child(name: str, peers: Path) -> Child:
    """The arm's process. Ours has the environment of our workers."""
    command = [sys.executable, "-m", "tools.benchmarks.arms", name]
    if name not in ARMS:
        command = [str(python_of(name, peers)), str(PEERS / f"{name}_arm.py")]
    return Child(command, ROOT, os.environ | SPIN if name in OURS else os.environ)


@dataclass(frozen=True, slots=True)
class Cell:
    """A measurement: `batch` prompts answered, or (batch 0) one long prompt prefilled."""

    shape: str
    dtype: str
    batch: int

    @property
    def what(self) -> str:
        """Its name in the table."""
        return f"decode {self.batch}" if self.batch else f"prefill 1x{PREFILL}"


def checkpoint(shape: str, folder: Path) -> Path:
    """A folder with random weights of this shape, which every engine reads."""
    files = resolve_model(f"random:{shape}")
    to = folder / shape
    if not (to / "config.json").exists():
        model = load_model(files, torch.device("cpu"), torch.float32)
        model.set_attn_implementation("eager")
        model.save_pretrained(to)
        (to / "tokenizer.json").write_bytes(files.tokenizer_file.read_bytes())
        (to / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return to


def forwards_of(shape: str, dtype: str, batch: int, new: int) -> list[tuple[Work, int]]:
    """The work of each kind of forward in the cell, and their number."""
    found = required_shape(resolve_model(f"random:{shape}"))
    if not batch:
        return [(found.work(tokens=PREFILL, answers=1, cached=0, dtype=dtype), 1)]
    prefill = found.work(tokens=batch * PROMPT, answers=batch, cached=0, dtype=dtype)
    cached = batch * (2 * PROMPT + new) // 2  # in the middle of the answers
    step = found.work(tokens=batch, answers=batch, cached=cached, dtype=dtype)
    return [(prefill, 1), (step, new - 1)]


def roofline_of(cell: Cell, limits: Limits, new: int) -> float:
    """Tokens/s of the whole call if every forward ran at the limits."""
    forwards = forwards_of(cell.shape, cell.dtype, cell.batch, new)
    seconds = sum(count * work.seconds(limits, cell.dtype) for work, count in forwards)
    return (cell.batch * new if cell.batch else PREFILL) / seconds


def run_cell(
    cell: Cell,
    children: dict[str, Child],
    failed: dict[str, str],
    meter: Meter,
    rounds: int,
    new: int,
    clock: str = "seconds",
) -> tuple[dict[str, Arm], list[Limits], dict[str, float]]:
    """Run every arm `rounds` times in turn. Returns the arms, the limits of each round, and the share of
    CHECKED tokens up to which each arm's answers equal those of transformers. `clock`: which seconds of
    an answer count (peers/lines.py)."""
    numbers = random.Random(cell.batch)
    length = PROMPT if cell.batch else PREFILL
    prompts = [
        [numbers.randrange(5, 2000) for _ in range(length)] for _ in range(max(cell.batch, 1))
    ]
    rates: dict[str, list[float]] = {name: [] for name in children}
    answers: dict[str, list[list[int]]] = {}
    whys = dict(failed)
    limits: list[Limits] = []
    for number in range(rounds + 1):  # the first round warms up
        for name, each in children.items():
            if name in whys:
                continue
            if cell.batch:
                got = each.ask(do="generate", prompts=prompts, new=new if number else min(new, 8))
            else:
                got = each.ask(do="prefill", prompt=prompts[0])
            if "failure" in got:
                whys[name] = got["failure"]
            elif number:
                answers[name] = got.get("ids", [])
                tokens = sum(map(len, answers[name])) if cell.batch else PREFILL
                rates[name].append(tokens / got[clock])
        if number:
            limits.append(meter.limits())
    arms = {name: Arm(tuple(rates[name]), whys.get(name, "")) for name in children}
    reference = answers.get("transformers", [])
    same = {
        name: min(
            same_start(a[:CHECKED], b[:CHECKED]) for a, b in zip(ids, reference, strict=False)
        )
        for name, ids in answers.items()
        if ids and reference
    }
    return arms, limits, same


def line_of(
    cell: Cell, arms: dict[str, Arm], limits: list[Limits], new: int
) -> tuple[list[str], dict[str, Any]]:
    """The cell's line of the table, and its record for the file."""
    rooflines = [roofline_of(cell, each, new) for each in limits]
    roofline = statistics.median(rooflines)
    verdict = judge(arms, OURS[0], rooflines, OURS)
    shown = [f"{arm.median:,.0f}" if arm.rates else "failed" for arm in arms.values()]
    judged = [f"{verdict.ratio:.2f}" if verdict.peer else "", f"{verdict.share:.0%}"]
    line = [f"{cell.shape} {cell.dtype}", cell.what, *shown, f"{roofline:,.0f}", *judged]
    line.append(f"{verdict.goal:,.0f} {'hit' if verdict.hit else 'MISS'}")
    record: dict[str, Any] = {"cell": asdict(cell)}
    record |= {"arms": {name: asdict(arm) for name, arm in arms.items()}}
    record |= {"limits": [asdict(each) for each in limits], "rooflines": rooflines}
    return line, record | {"roofline": roofline, "verdict": asdict(verdict)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shape", "shapes", multiple=True, default=("gpt2", "qwen2-0.5b"), show_default=True)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(sorted(DTYPES)),
    default=DTYPES,
    show_default=True,
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(0),
    default=(1, 4, 16, 64, 0),
    show_default=True,
    help="Prompts of a cell; 0: one prefill of 512 tokens.",
)
@click.option("--arm", "wanted", multiple=True, help="[default: all that are installed]")
@click.option("--rounds", default=3, show_default=True)
@click.option("--new-tokens", default=100, show_default=True)
@click.option("--threads", type=int, default=None, help="[default: all cores]")
@click.option("--peers", type=click.Path(path_type=Path), default=HOME, show_default=True)
@click.option(
    "--cpu-time", is_flag=True, help="CPU seconds of the arm's process, not time that passes."
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder that keeps the checkpoints for the peers.  [default: a temporary folder]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for engine.json and engine.png.",
)
def main(
    shapes: tuple[str, ...], dtypes: tuple[str, ...], batches: tuple[int, ...],
    wanted: tuple[str, ...], rounds: int, new_tokens: int, threads: int | None, peers: Path,
    cpu_time: bool, work_dir: Path | None, output: Path | None,
) -> None:  # fmt: skip
    """Our engine against every installed peer, and against this machine's limits."""
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    names = arms_of(wanted, peers)
    clock = "cpu_seconds" if cpu_time else "seconds"
    if cpu_time and OURS[1] in names:
        raise click.BadParameter(
            f"{OURS[1]!r} runs in several processes: name the other arms with --arm",
            param_hint="--cpu-time",
        )
    head = ["tokens/s, median", "", *names, "roofline", "ours/peer", "of roofline", "goal"]
    lines, records = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes:
            folder = checkpoint(shape, work_dir or Path(temporary))
            for dtype in dtypes:
                meter = Meter((dtype,))
                click.echo(
                    f"{shape} {dtype}, {threads} threads; now it {described(meter.limits())}"
                )
                with ExitStack() as stack:
                    children = {name: stack.enter_context(child(name, peers)) for name in names}
                    failed = load(children, folder, dtype, threads)
                    for batch in batches:
                        cell = Cell(shape, dtype, batch)
                        arms, limits, same = run_cell(
                            cell, children, failed, meter, rounds, new_tokens, clock
                        )
                        line, record = line_of(cell, arms, limits, new_tokens)
                        lines.append(line)
                        records.append(record | {"same_as_transformers": same})
                        click.echo("  ".join(line) + apart(same))
                if output is not None:
                    about = {"torch": torch.__version__, "cells": records}
                    save(output, "engine", about, partial(draw_engine, records))
    click.echo("\n" + table(head, lines))


def arms_of(wanted: tuple[str, ...], peers: Path) -> list[str]:
    """The arms to run: ours, transformers and the installed peers, or those named."""
    installed = [name for name in PACKAGES if python_of(name, peers).exists()]
    names = [*ARMS, *installed]
    for name in wanted:
        if name not in names:
            way = (
                f"; python -m tools.benchmarks.peers {name} installs it" if name in PACKAGES else ""
            )
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(names)}{way}", param_hint="--arm"
            )
    if wanted and OURS[0] not in wanted:
        raise click.BadParameter(
            "add --arm ours: the others are compared with it", param_hint="--arm"
        )
    return [name for name in names if not wanted or name in wanted]


def load(children: dict[str, Child], folder: Path, dtype: str, threads: int) -> dict[str, str]:
    """Load the arms one after the other. Prints and returns the failures."""
    failed = {}
    for name, each in children.items():
        got = each.ask(do="load", folder=str(folder), dtype=dtype, threads=threads)
        if "failure" in got:
            failed[name] = got["failure"]
            click.echo(f"{folder.name} {dtype}: {name} failed: {got['failure']}")
        else:
            click.echo(f"{folder.name} {dtype}: {name} is loaded after {got['seconds']:.1f} s")
    return failed


def apart(same: dict[str, float]) -> str:
    """The arms that differ from transformers within CHECKED tokens, and where. In bfloat16 and int8
    that is rounding; in float32 it is a bug."""
    arms = [f"{name} after {share * CHECKED:.0f}" for name, share in same.items() if share < 1]
    return f"  (other tokens than transformers': {', '.join(arms)})" if arms else ""


def described(limits: Limits) -> str:
    """The limits in one line."""
    rates = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in limits.gemm_gflop_s.items())
    return f"reads {limits.read_gb_s:.1f} GB/s; products, GFLOP/s: {rates}"


if __name__ == "__main__":
    main(prog_name="python main.py bench engine")
