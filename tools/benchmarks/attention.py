"""Paged attention in C++ against the torch version: ms of one layer, GB/s of KV read, GFLOP/s.

    python main.py bench attention --threads 2 --repeats 7

Decode is bound by memory, so compare GB/s; prefill is bound by arithmetic, so compare GFLOP/s. Blocks are
in random order. Layers of 256 MB in total take turns, as in a model, so that no cache holds them. The
arms take turns too. The last line printed is JSON.
"""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch

from baton.engine.attention import AttentionParams, Kernel
from baton.engine.batch import Batch, pack
from baton.engine.cpu.kernel import NativeAttention
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row

BLOCK = 16
COLD_BYTES = 256e6
HEADS = {"gpt2": (12, 12, 64), "qwen2-0.5b": (14, 2, 64)}  # heads, kv heads, dimensions
CASES = ((64, 1, 128), (64, 1, 1024), (1, 1, 1024), (1, 512, 512), (1, 2048, 2048))
ARMS: dict[str, Callable[[Batch, int], Kernel]] = {
    "native": NativeAttention,
    "gather": GatherAttention,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One layer's attention of `rows` sequences, `queries` new tokens each."""

    shape: str
    dtype: str
    rows: int
    queries: int
    context: int
    arm: str
    median_ms: float
    fastest_ms: float
    gb_per_s: float
    gflop_per_s: float


def make_pool(shape: str, dtype: str, rows: int, context: int) -> tuple[Pool, list[list[int]]]:
    """A pool of random numbers, and each sequence's blocks."""
    _, kv_heads, dim = HEADS[shape]
    layer = LayerShape(kv_heads, dim, dim)
    each = rows * -(-context // BLOCK)
    layers = min(24, 1 + int(COLD_BYTES / (each * KVLayout((layer,), BLOCK, dtype).block_bytes)))
    pool = Pool.private(KVLayout((layer,) * layers, BLOCK, dtype), each, torch.device("cpu"))
    for part in (*pool.keys, *pool.values):
        part.normal_()
    order = random.Random(0).sample(range(each), each)
    return pool, [order[row::rows] for row in range(rows)]


def measure(
    shape: str, dtype: str, case: tuple[int, int, int], *, repeats: int, threads: int
) -> list[Figure]:
    """Both arms of one case."""
    rows, queries, context = case
    heads, kv_heads, dim = HEADS[shape]
    pool, tables = make_pool(shape, dtype, rows, context)
    batch = pack(
        [Row([0] * queries, context - queries, table) for table in tables],
        BLOCK,
        torch.device("cpu"),
    )
    query = torch.randn(rows * queries, heads, dim).to(pool.keys[0].dtype)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    torch.set_num_threads(threads)
    for _ in range(repeats + 1):
        for arm, plan in ARMS.items():
            kernel = plan(batch, BLOCK)
            for layer in range(len(pool.keys)):
                begun = time.perf_counter()
                kernel(query, pool, layer, AttentionParams(dim**-0.5))
                times[arm].append((time.perf_counter() - begun) * 1e3)
    read = rows * context * kv_heads * dim * 2 * pool.keys[0].element_size()
    pairs = rows * sum(range(context - queries + 1, context + 1))
    figures = []
    for arm, taken in times.items():
        warm = taken[len(pool.keys) :]
        median = statistics.median(warm)
        figures.append(
            Figure(
                *(shape, dtype, rows, queries, context, arm),
                median_ms=round(median, 3),
                fastest_ms=round(min(warm), 3),
                gb_per_s=round(read / median / 1e6, 1),
                gflop_per_s=round(pairs * heads * dim * 4 / median / 1e6, 1),
            )
        )
    return figures


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--shape", "shapes", multiple=True, type=click.Choice([*HEADS]), default=[*HEADS])
def main(threads: int, repeats: int, shapes: tuple[str, ...]) -> None:
    """Time paged attention, native and in torch, at decode and prefill."""
    title = ("shape", "dtype", "rows x queries of context", "arm", "median ms", "GB/s", "GFLOP/s")
    print("{:<12}{:<10}{:<27}{:<8}{:>10}{:>8}{:>9}".format(*title))
    figures = []
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            for case in CASES:
                for f in measure(shape, dtype, case, repeats=repeats, threads=threads):
                    what = f"{f.rows} x {f.queries} of {f.context}"
                    print(
                        f"{f.shape:<12}{f.dtype:<10}{what:<27}{f.arm:<8}"
                        f"{f.median_ms:>10.3f}{f.gb_per_s:>8.1f}{f.gflop_per_s:>9.1f}",
                        flush=True,
                    )
                    figures.append(f)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**machine, "threads": threads, "figures": [asdict(f) for f in figures]}))


if __name__ == "__main__":
    main()
