"""Rows times packed weights: ours (native/gemm.h) against torch's oneDNN and the memory's speed.

    python main.py bench gemm --type f32 --rows 1 --rows 64 --threads 2

Each weight stands for a layer of a model: copies of it that exceed the caches are used one after another.
Ours takes and returns fp32 rows, and its time includes rounding or quantizing them. oneDNN's rows already
have the weights' type; for int8 with one scale for all. Both take turns, so a slow moment of the machine
hits both. Figures are medians. The last line is JSON.
"""

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from baton.engine.cpu.build import build
from baton.engine.cpu.packed import can_pack

SOURCE = Path(__file__).with_suffix(".cpp")
SHAPES = {  # N, K
    "gpt2 qkv": (2304, 768),
    "gpt2 out": (768, 768),
    "gpt2 up": (3072, 768),
    "gpt2 down": (768, 3072),
    "gpt2 head": (50257, 768),
    "qwen qkv": (1152, 896),
    "qwen out": (896, 896),
    "qwen gate up": (9728, 896),
    "qwen down": (896, 4864),
    "qwen head": (151936, 896),
}
TYPES = {"f32": (0, 4), "bf16": (1, 2), "i8": (2, 1)}
CACHES = 128 << 20  # bytes, more than all caches: the copies of a weight exceed this

CALM_S = 0.02  # pause: the other side's threads spin for a while after their work


class WeightStruct(ctypes.Structure):
    """Weight of gemm_pack.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("n", ctypes.c_long),
        ("k", ctypes.c_long),
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape, type, number of rows and of threads. Times in µs for one product."""

    shape: str
    type: str
    rows: int
    threads: int
    ours_us: float
    onednn_us: float
    ours_gb_per_s: float
    ours_gflop_per_s: float

    @property
    def ratio(self) -> float:
        """Our speed over oneDNN's."""
        return self.onednn_us / self.ours_us


def load_library() -> ctypes.CDLL:
    """gemm.cpp, compiled."""
    library = build([str(SOURCE)], "gemm-benchmark")
    library.gemm_packed_bytes.restype = library.gemm_rows_bytes.restype = ctypes.c_long
    library.gemm_sweep.restype = library.read_all.restype = ctypes.c_double
    return library


def aligned(size: int) -> Tensor:
    """`size` bytes at a multiple of 64."""
    room = torch.empty(size + 64, dtype=torch.uint8)
    return room[-room.data_ptr() % 64 :][:size]


class Ours:
    """`copies` of a weight, packed."""

    def __init__(self, library: ctypes.CDLL, kind: str, weight: Tensor, copies: int) -> None:
        self.library = library
        self.number = TYPES[kind][0]
        self.n, self.k = weight.shape
        shape = (ctypes.c_long(self.n), ctypes.c_long(self.k))
        size = library.gemm_packed_bytes(self.number, *shape)
        self.panels = [aligned(size) for _ in range(copies)]
        self.scales = torch.empty(self.n)
        source, scales = (ctypes.c_void_p(each.data_ptr()) for each in (weight, self.scales))
        for panels in self.panels:
            to = ctypes.c_void_p(panels.data_ptr())
            library.gemm_pack(self.number, source, *shape, to, scales, torch.get_num_threads())
        self.weights = (WeightStruct * copies)(
            *(
                WeightStruct(self.number, *weight.shape, p.data_ptr(), self.scales.data_ptr(), None)
                for p in self.panels
            )
        )

    def timer(self, rows: Tensor, threads: int) -> Callable[[], float]:
        """Seconds of one product, the mean over the copies."""
        m = ctypes.c_long(rows.shape[0])
        out = torch.empty(rows.shape[0], self.n)
        prepared = aligned(self.library.gemm_rows_bytes(self.number, m, ctypes.c_long(self.k)))
        copies = len(self.panels)

        def run() -> float:
            rows_at, prepared_at, out_at = (
                ctypes.c_void_p(each.data_ptr()) for each in (rows, prepared, out)
            )
            taken: float = self.library.gemm_sweep(
                self.weights, ctypes.c_long(copies), rows_at, prepared_at, m, out_at, threads
            )
            return taken / copies

        return run


class OneDnn:
    """The same through torch: packed, or its own linear where this CPU cannot pack the dtype."""

    def __init__(self, kind: str, weight: Tensor, copies: int) -> None:
        self.kind = kind
        self.scales = weight.abs().amax(1) / 127
        self.zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
        if kind == "i8":
            quantized = (weight / self.scales[:, None]).round().to(torch.int8)
            self.packed = [
                torch.ops.onednn.qlinear_prepack(quantized.clone(), None) for _ in range(copies)
            ]
        else:
            dtype = torch.float32 if kind == "f32" else torch.bfloat16
            self.packs = can_pack(dtype)
            self.packed = [
                torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 64)
                if self.packs
                else weight.to(dtype, copy=True)
                for _ in range(copies)
            ]

    def timer(self, rows: Tensor, threads: int) -> Callable[[], float]:
        """Seconds of one product, the mean over the copies."""
        if self.kind == "i8":
            scale = float(rows.abs().amax() / 127)
            quantized = ((rows / scale).round() + 128).to(torch.uint8)
            tail: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")

            def product(weight: Tensor) -> None:
                torch.ops.onednn.qlinear_pointwise(
                    quantized, scale, 128, weight, self.scales, self.zeros, *tail
                )

        else:
            typed = rows if self.kind == "f32" else rows.bfloat16()

            def product(weight: Tensor) -> None:
                if self.packs:
                    torch.ops.mkldnn._linear_pointwise(typed, weight, None, "none", [], "")
                else:
                    torch.nn.functional.linear(typed, weight)

        def run() -> float:
            torch.set_num_threads(threads)
            begun = time.perf_counter()
            for weight in self.packed:
                product(weight)
            return (time.perf_counter() - begun) / len(self.packed)

        return run


def medians(timers: list[Callable[[], float]], seconds: float) -> list[float]:
    """The median of each timer, taking turns for `seconds` and at least three times."""
    for timer in timers:
        timer()
    taken: list[list[float]] = [[] for _ in timers]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken[0]) < 3:
        for timer, times in zip(timers, taken, strict=True):
            time.sleep(CALM_S)
            times.append(timer())
    return [statistics.median(times) for times in taken]


def pin(start: Callable[[], object], cores: list[int]) -> None:
    """Run `start` and pin each thread that it creates to its own core, except the first core. Otherwise
    threads that spin for each other may share a core for a long time."""
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())
    start()
    made = sorted(set(tasks.iterdir()) - before, key=lambda task: int(task.name))
    for task, core in zip(made, cores[1:], strict=False):
        os.sched_setaffinity(int(task.name), {core})


def pin_all(library: ctypes.CDLL, threads: int) -> None:
    """The threads of both sides, and this one."""
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    square = torch.ones(1024, 1024)
    pin(lambda: square @ square, cores)
    pin(lambda: read_speed(library, threads), cores)
    os.sched_setaffinity(0, {cores[0]})


def read_speed(library: ctypes.CDLL, threads: int) -> float:
    """GB/s of reading alone."""
    data, out = torch.ones(64 << 20), torch.empty(threads)
    where, to = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr())
    count = ctypes.c_long(data.numel())
    (taken,) = medians([lambda: library.read_all(where, count, to, threads)], 0.5)
    return data.numel() * 4 / taken / 1e9


def show(figure: Figure) -> None:
    """One line of the table."""
    click.echo(
        f"{figure.shape:<14}{figure.type:<6}{figure.rows:>5}{figure.threads:>8}"
        f"{figure.ours_us:>11.1f}{figure.onednn_us:>11.1f}{figure.ratio:>8.2f}"
        f"{figure.ours_gb_per_s:>8.1f}{figure.ours_gflop_per_s:>9.0f}"
    )


@click.command()
@click.option("--shape", "shapes", multiple=True, default=tuple(SHAPES), show_default=True)
@click.option("--type", "kinds", multiple=True, default=tuple(TYPES), show_default=True)
@click.option("--rows", multiple=True, type=int, default=(1, 4, 16, 64, 512), show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--seconds", default=0.2, show_default=True, help="For each figure, both sides.")
def main(
    shapes: tuple[str, ...],
    kinds: tuple[str, ...],
    rows: tuple[int, ...],
    threads: tuple[int, ...],
    seconds: float,
) -> None:
    """Time products of rows and packed weights; print µs, GB/s of the weights and GFLOP/s."""
    library = load_library()
    pin_all(library, max(threads))
    speeds = {count: read_speed(library, count) for count in threads}
    for count, speed in speeds.items():
        click.echo(f"reading memory, {count} threads: {speed:.1f} GB/s")
    click.echo(
        f"{'weight':<14}{'type':<6}{'rows':>5}{'threads':>8}{'ours':>8} µs{'oneDNN':>8} µs"
        f"{'times':>8}{'GB/s':>8}{'GFLOP/s':>9}"
    )
    figures = []
    for shape, kind in ((shape, kind) for shape in shapes for kind in kinds):
        n, k = SHAPES[shape]
        size = n * k * TYPES[kind][1]
        copies = CACHES // size + 1
        weight = torch.randn(n, k)
        both = Ours(library, kind, weight, copies), OneDnn(kind, weight, copies)
        for count, m in ((count, m) for count in threads for m in rows):
            ours, onednn = medians([x.timer(torch.randn(m, k), count) for x in both], seconds)
            flops = 2 * m * n * k / ours / 1e9
            us = 1e6
            figure = Figure(shape, kind, m, count, ours * us, onednn * us, size / ours / 1e9, flops)
            figures.append(figure)
            show(figure)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**machine, "read": speeds, "figures": [asdict(f) for f in figures]}))


if __name__ == "__main__":
    main()
