"""Where each millisecond of a forward goes: stage by stage, against the plain torch path.

    python main.py bench step --model random:gpt2 --dtype float32 --batch 1 --batch 64 --prefill 512

Every stage is called and timed on its own; shown is the median of several rounds. GB/s and GFLOP/s count
weights and products only. "all in one call" is the same forward as it really runs; "torch" is
transformers' code with our attention, which runs without a compiler; "not compiled" is what a model that
cannot be compiled has besides, native attention and packed linears. CPU ms are those of all threads.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import click
import torch

from baton.engine.boot import boot
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.select import not_compiled
from baton.engine.device import DTYPES
from baton.engine.loading import load_model
from baton.engine.pool import Pool
from baton.engine.runner import Forward
from baton.engine.selftest import in_torch
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row
from baton.model_files import ModelFiles, resolve_model
from baton.table import table

BLOCK = 16
CONTEXT = 110


def decode_rows(batch: int) -> list[Row]:
    """One token for each sequence, with CONTEXT tokens before it."""
    each = CONTEXT // BLOCK + 1
    tables = [list(range(i * each, (i + 1) * each)) for i in range(batch)]
    return [Row([i], CONTEXT, blocks, Logits.LAST) for i, blocks in enumerate(tables)]


def prefill_rows(tokens: int) -> list[Row]:
    """One prompt."""
    return [Row([7] * tokens, 0, list(range(-(-tokens // BLOCK))), Logits.LAST)]


def pool_for(runner: Forward, layout: KVLayout, rows: list[Row]) -> Pool:
    """A pool for the rows, filled with random numbers: memory that was never written is one page of
    zeros, which is always in the cache."""
    pool = Pool.private(layout, 1 + max(max(row.blocks) for row in rows), runner.device)
    for each in (*pool.keys, *pool.values):
        each.normal_()
    return pool


def line_of(name: str, run: Callable[[], object], rounds: int) -> list[str]:
    """A line of the table: median ms of several calls, after a warm-up, and those of the CPU."""
    run()
    times, spent = [], []
    for _ in range(rounds):
        begun, used = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - begun)
        spent.append(time.process_time() - used)
    ms, cpu_ms = (statistics.median(each) * 1e3 for each in (times, spent))
    return [name, "", f"{ms:.2f}", f"{cpu_ms:.2f}", "", ""]


def stages(runner: NativeRunner, pool: Pool, rows: list[Row], rounds: int) -> list[list[str]]:
    """Lines of the table, the slowest stage first."""
    runs = [runner.timed(pool, rows) for _ in range(rounds + 1)][1:]
    tokens = sum(len(row.token_ids) for row in rows)
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for number, (stage, _) in enumerate(runs[0]):
        ms = statistics.median(run[number][1] for run in runs) * 1e3
        name = f"{stage.kind} {stage.n} x {stage.k}" if stage.n else stage.kind
        line = spent[name]
        last = stage.kind == "product" and number >= len(runs[0]) - 2
        counted = len(rows) if last else tokens
        for i, more in enumerate((ms, 1, stage.weight_bytes, 2.0 * stage.n * stage.k * counted)):
            line[i] += more
    lines = []
    for name, (ms, count, size, flops) in sorted(spent.items(), key=lambda each: -each[1][0]):
        rates = [f"{size / ms / 1e6:.1f}", f"{flops / ms / 1e6:.0f}"] if size else ["", ""]
        lines.append([name, f"{count:.0f}", f"{ms:.2f}", "", *rates])
    return lines


def report(runner: NativeRunner, layout: KVLayout, rows: list[Row], rounds: int) -> list[list[str]]:
    """All lines about the compiled forward."""
    pool = pool_for(runner, layout, rows)
    lines = stages(runner, pool, rows, rounds)
    total = sum(float(line[2]) for line in lines)
    return [
        *lines,
        ["sum of stages", "", f"{total:.2f}", "", "", ""],
        line_of("all in one call", lambda: runner.run(pool, rows), rounds),
    ]


def in_plain_torch(files: ModelFiles, dtype: str, rows: list[Row], rounds: int) -> list[list[str]]:
    """Lines about the same forward in torch."""
    lines = []
    for name, make in (("torch", in_torch), ("not compiled", not_compiled)):
        model = load_model(files, torch.device("cpu"), DTYPES[dtype])
        runner, layout = make(model, DTYPES[dtype], BLOCK)
        pool = pool_for(runner, layout, rows)
        lines.append(line_of(name, partial(runner.run, pool, rows), rounds))
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="random:gpt2", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, help="Decode at this batch size.")
@click.option("--prefill", "prefills", multiple=True, type=int, help="Prefill this many tokens.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", type=int, default=None, help="[default: all cores]")
@click.option("--no-torch", is_flag=True, help="Leave the plain torch path out.")
def main(
    model: str,
    dtype: str,
    batches: tuple[int, ...],
    prefills: tuple[int, ...],
    rounds: int,
    threads: int | None,
    no_torch: bool,
) -> None:
    """Where each millisecond of a forward goes."""
    if threads:
        torch.set_num_threads(threads)
    files = resolve_model(model)
    engine = boot(files, device="cpu", dtype=dtype, block_size=BLOCK)
    if not isinstance(engine.runner, NativeRunner):
        raise click.ClickException(f"{model} is not compiled here: there are no stages to time")
    cases = [(f"decode, batch {each}", decode_rows(each)) for each in batches or (1, 64)]
    cases += [(f"prefill, {each} tokens", prefill_rows(each)) for each in prefills]
    for name, rows in cases:
        click.echo(f"\n{model} {dtype}, {torch.get_num_threads()} threads: {name}")
        lines = report(engine.runner, engine.layout, rows, rounds)
        if not no_torch and dtype in DTYPES:
            lines += in_plain_torch(files, dtype, rows, rounds)
        click.echo(table(["stage", "times", "ms", "CPU ms", "GB/s", "GFLOP/s"], lines))


if __name__ == "__main__":
    main(prog_name="python main.py bench step")
