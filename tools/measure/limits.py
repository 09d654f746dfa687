"""Limits of this machine: memory read speed and matrix product speed.

Every benchmark run measures them again, in the same way: on a shared machine they change, so a share of
an old limit means nothing.
"""

import contextlib
import mmap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from baton.dtypes import INT8_WEIGHT_ONLY

BUFFER = 512 << 20  # bytes, more than any cache
ROWS = 1024  # rows of the products
SHAPES = ((3072, 768), (4864, 896))  # [N, K]
DTYPES = ("float32", "bfloat16", "int8", INT8_WEIGHT_ONLY)


@dataclass(frozen=True, slots=True)
class Limits:
    """GB/s read by all threads; GFLOP/s (int8: GOP/s) of oneDNN's products, by dtype."""

    read_gb_s: float
    gemm_gflop_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """The least a forward moves and computes: bytes from memory, floating-point operations."""

    weight_bytes: float
    kv_bytes: float
    flops: float

    def seconds(self, limits: Limits, dtype: str) -> float:
        """The time at the limits: of memory or of arithmetic, whichever is longer."""
        moved = (self.weight_bytes + self.kv_bytes) / (limits.read_gb_s * 1e9)
        return max(moved, self.flops / (limits.gemm_gflop_s[dtype] * 1e9))


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest call, after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


class Meter:
    """Measures the limits repeatedly, as a shared machine's speed changes."""

    def __init__(self, dtypes: Iterable[str] = DTYPES) -> None:
        self._buffer = _buffer()
        self._products = {dtype: [_product(dtype, n, k) for n, k in SHAPES] for dtype in dtypes}

    def limits(self, repeats: int = 5) -> Limits:
        """The limits with all of torch's threads, each the fastest of `repeats`. Takes a second or
        two."""
        read = BUFFER / best(self._buffer.sum, repeats) / 1e9
        rates = {
            dtype: max(2.0 * ROWS * n * k / best(run, repeats) / 1e9 * share
                       for (n, k), (run, share) in zip(SHAPES, runs, strict=True))
            for dtype, runs in self._products.items()
        }  # fmt: skip
        return Limits(read, rates)


def measure() -> Limits:
    """The limits, once, for every dtype."""
    return Meter().limits()


def _buffer() -> torch.Tensor:
    """A buffer in huge pages if the system has them, like most mapped weights. In small pages the same
    machine reads 20 GB/s instead of 26."""
    memory = mmap.mmap(-1, BUFFER)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64).fill_(1)


def _product(dtype: str, n: int, k: int) -> tuple[Callable[[], object], float]:
    """A product of ROWS rows and a weight, and the factor of its rate. Without an int8 product the bf16
    rate counts double, an estimate. Weight-only int8 multiplies in bf16."""
    if dtype == "int8":
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):
            return _int8_product(n, k), 1.0
        return _float_product(torch.bfloat16, n, k), 2.0
    kind = torch.bfloat16 if dtype == INT8_WEIGHT_ONLY else getattr(torch, dtype)
    return _float_product(kind, n, k), 1.0


def _float_product(kind: torch.dtype, n: int, k: int) -> Callable[[], object]:
    """A linear with a weight packed by oneDNN if this torch supports it, else torch's own."""
    rows, weight = torch.randn(ROWS, k).to(kind), torch.randn(n, k).to(kind)

    def plain() -> object:
        return torch.nn.functional.linear(rows, weight)

    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

        def run() -> object:
            return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")

        run()
    except (RuntimeError, AttributeError):
        return plain
    return run


def _int8_product(n: int, k: int) -> Callable[[], object]:
    """oneDNN's int8 linear. Raises if this torch has none."""
    weight = torch.randint(-127, 127, (n, k), dtype=torch.int8)
    rows = torch.randint(0, 255, (ROWS, k), dtype=torch.uint8)
    scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(weight, [ROWS, k])
    tail: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")

    def run() -> object:
        return torch.ops.onednn.qlinear_pointwise(rows, 0.1, 128, packed, scales, zeros, *tail)

    run()
    return run
