"""Paged attention in C++ against the torch version: ms of one layer, GB/s of KV read, GFLOP/s.

    python main.py bench attention --threads 2 --repeats 7
    python main.py bench attention --threads 1 --cpu-time --arm native --against ../before

Decode is bound by memory, so compare GB/s; prefill is bound by arithmetic, so compare GFLOP/s. Blocks are
in random order. Layers of 256 MB in total take turns at decode, as in a model, so that no cache holds
them. The arms take turns call by call.

--cpu-time counts the CPU seconds of this process instead of the time that passes: on a shared machine
they vary less. Threads that wait for each other count too, so use it with --threads 1.
--against adds an arm: the C++ of another checkout, compiled with the same compiler and flags.
CXX="c++ -march=x86-64-v3" compiles all for a CPU with AVX2 alone. The last line printed is JSON.
"""

import ctypes
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from baton.engine.attention import AttentionParams, Kernel
from baton.engine.batch import Batch, pack
from baton.engine.cpu.build import KERNEL, compile_library, find_compiler, this_cpu
from baton.engine.cpu.kernel import NativeAttention, declared
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row

BLOCK = 16
COLD_BYTES = 256e6
HEADS = {"gpt2": (12, 12, 64), "qwen2-0.5b": (14, 2, 64)}  # heads, kv heads, dimensions
DTYPES = ("float32", "bfloat16")
CASES = (  # sequences, new tokens of each, its context
    *((64, 1, 128), (64, 1, 1024), (16, 1, 1024), (4, 1, 1024), (1, 1, 1024)),
    *((1, 512, 512), (1, 2048, 2048)),
)
Plan = Callable[[Batch[torch.Tensor], int], Kernel]
ARMS: Mapping[str, Plan] = {"native": NativeAttention, "gather": GatherAttention}
AGAINST = "before"


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


@contextmanager
def arm_of_checkout(checkout: Path) -> Iterator[Plan]:
    """Attention as the C++ of another checkout computes it. BuildFailed or CompileError."""
    native = checkout / "baton/engine/cpu/native"
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        sources = {Path(folder) / f"{Path(each).stem}.o": native / each for each in KERNEL}
        made = Path(folder) / "kernel.so"
        compile_library(this_cpu(find_compiler()), sources, made)
        library = declared(ctypes.CDLL(str(made)))
        yield lambda batch, block_size: NativeAttention(batch, block_size, native=library)


def layers_for(queries: int, layer_bytes: int) -> int:
    """Layers that take turns. A prompt's keys have just been written, so a cache may hold them."""
    return min(24, 1 + int(COLD_BYTES / layer_bytes)) if queries == 1 else 1


def make_pool(
    shape: str, dtype: str, rows: int, queries: int, context: int
) -> tuple[Pool, list[list[int]]]:
    """A pool of random numbers, and each sequence's blocks."""
    _, kv_heads, dim = HEADS[shape]
    layer = LayerShape(kv_heads, dim, dim)
    each = rows * -(-context // BLOCK)
    layers = layers_for(queries, each * KVLayout((layer,), BLOCK, dtype).block_bytes)
    pool = Pool.private(KVLayout((layer,) * layers, BLOCK, dtype), each, torch.device("cpu"))
    for part in (*pool.keys, *pool.values):
        part.normal_()
    order = random.Random(0).sample(range(each), each)
    return pool, [order[row::rows] for row in range(rows)]


def measure(
    shape: str,
    dtype: str,
    case: tuple[int, int, int],
    arms: Mapping[str, Plan],
    *,
    repeats: int,
    clock: Callable[[], float],
) -> list[Figure]:
    """All arms of one case: the first call of each warms up, then every arm computes every layer
    `repeats` times. Arms take turns on different layers, so that none finds the other's in the cache."""
    rows, queries, context = case
    heads, kv_heads, dim = HEADS[shape]
    pool, tables = make_pool(shape, dtype, rows, queries, context)
    batch = pack(
        [Row([0] * queries, context - queries, table) for table in tables],
        BLOCK,
        torch.device("cpu"),
    )
    query = torch.randn(rows * queries, heads, dim).to(pool.keys[0].dtype)
    kernels = {arm: plan(batch, BLOCK) for arm, plan in arms.items()}
    layers = len(pool.keys)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for call in range(1 + repeats * layers):
        for place, (arm, kernel) in enumerate(kernels.items()):
            layer = (call + place * layers // len(kernels)) % layers
            begun = clock()
            kernel(query, pool, layer, AttentionParams(dim**-0.5))
            times[arm].append((clock() - begun) * 1e3)
    read = rows * context * kv_heads * dim * 2 * pool.keys[0].element_size()
    pairs = rows * sum(range(context - queries + 1, context + 1))
    figures = []
    for arm, (_, *warm) in times.items():
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


def run_all(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    arms: Mapping[str, Plan],
    repeats: int,
    clock: Callable[[], float],
) -> list[Figure]:
    """Every case, printed as soon as it is known."""
    title = ("shape", "dtype", "rows x queries of context", "arm", "median ms", "fastest")
    print("{:<12}{:<10}{:<27}{:<8}{:>10}{:>9}{:>8}{:>9}".format(*title, "GB/s", "GFLOP/s"))
    figures = []
    for shape in shapes:
        for dtype in dtypes:
            for case in CASES:
                for f in measure(shape, dtype, case, arms, repeats=repeats, clock=clock):
                    what = f"{f.rows} x {f.queries} of {f.context}"
                    print(
                        f"{f.shape:<12}{f.dtype:<10}{what:<27}{f.arm:<8}{f.median_ms:>10.3f}"
                        f"{f.fastest_ms:>9.3f}{f.gb_per_s:>8.1f}{f.gflop_per_s:>9.1f}",
                        flush=True,
                    )
                    figures.append(f)
    return figures


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--shape", "shapes", multiple=True, type=click.Choice([*HEADS]), default=[*HEADS])
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES)
@click.option("--arm", "names", multiple=True, type=click.Choice([*ARMS]), default=[*ARMS])
@click.option(
    "--against",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help=f"Another checkout; its C++ becomes the arm {AGAINST!r}.",
)
@click.option("--cpu-time", is_flag=True, help="CPU seconds of all threads, not time that passes.")
def main(
    threads: int,
    repeats: int,
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    names: tuple[str, ...],
    against: Path | None,
    cpu_time: bool,
) -> None:
    """Time paged attention, native and in torch, at decode and prefill."""
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    arms = {name: ARMS[name] for name in names}
    if against:
        with arm_of_checkout(against) as before:
            figures = run_all(shapes, dtypes, {AGAINST: before, **arms}, repeats, clock)
    else:
        figures = run_all(shapes, dtypes, arms, repeats, clock)
    about = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "compiler": os.environ.get("CXX", ""),
        "clock": "CPU time" if cpu_time else "wall time",
        "threads": threads,
    }
    print(json.dumps({**about, "figures": [asdict(f) for f in figures]}))


if __name__ == "__main__":
    main()
