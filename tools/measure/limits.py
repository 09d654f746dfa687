"""What this machine can do at most: bytes read a second, and multiplications a second.

Both are taken the same way in every run of a benchmark, beside its arms: on a shared machine they
move, and a share of last week's limit says nothing.
"""

import contextlib
import mmap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from baton.dtypes import INT8_WEIGHT_ONLY

BUFFER = 512 << 20  # bytes: no cache holds them
ROWS = 1024  # of the large products
SHAPES = ((3072, 768), (4864, 896))  # [N, K]
DTYPES = ("float32", "bfloat16", "int8", INT8_WEIGHT_ONLY)


@dataclass(frozen=True, slots=True)
class Limits:
    """GB/s read by all threads; GFLOP/s (int8: GOP/s) of oneDNN's products, by dtype."""

    read_gb_s: float
    gemm_gflop_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward cannot do without: bytes from memory, multiplications and additions."""

    weight_bytes: float
    kv_bytes: float
    flops: float

    def seconds(self, limits: Limits, dtype: str) -> float:
        """At the limits: whichever of memory and arithmetic takes longer."""
        moved = (self.weight_bytes + self.kv_bytes) / (limits.read_gb_s * 1e9)
        return max(moved, self.flops / (limits.gemm_gflop_s[dtype] * 1e9))


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest call: a limit is what was reached once."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


class Meter:
    """Takes the limits as often as it is asked: a shared machine's speed moves."""

    def __init__(self, dtypes: Iterable[str] = DTYPES) -> None:
        self._buffer = _buffer()
        self._products = {dtype: [_product(dtype, n, k) for n, k in SHAPES] for dtype in dtypes}

    def limits(self, repeats: int = 5) -> Limits:
        """On all of torch's threads: the fastest of so many. A second or two, for all dtypes."""
        read = BUFFER / best(self._buffer.sum, repeats) / 1e9
        rates = {
            dtype: max(2.0 * ROWS * n * k / best(run, repeats) / 1e9 * share
                       for (n, k), (run, share) in zip(SHAPES, runs, strict=True))
            for dtype, runs in self._products.items()
        }  # fmt: skip
        return Limits(read, rates)


def measure() -> Limits:
    """Once, for every dtype."""
    return Meter().limits()


def _buffer() -> torch.Tensor:
    """Large pages where the system has them, as a file of weights mostly is in: in small ones the
    same machine reads 20 GB/s instead of 26."""
    memory = mmap.mmap(-1, BUFFER)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64).fill_(1)


def _product(dtype: str, n: int, k: int) -> tuple[Callable[[], object], float]:
    """ROWS rows by a weight, and how its rate counts: where there is no product of two int8, one of
    bf16 is taken for twice its rate, a guess. Weight-only bytes are multiplied as bf16."""
    if dtype == "int8":
        with contextlib.suppress(RuntimeError, AttributeError, TypeError):
            return _int8_product(n, k), 1.0
        return _float_product(torch.bfloat16, n, k), 2.0
    kind = torch.bfloat16 if dtype == INT8_WEIGHT_ONLY else getattr(torch, dtype)
    return _float_product(kind, n, k), 1.0


def _float_product(kind: torch.dtype, n: int, k: int) -> Callable[[], object]:
    """A linear whose weight oneDNN has packed, where this torch can; else torch's own."""
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
    """oneDNN's int8 linear; an error where this torch has none."""
    weight = torch.randint(-127, 127, (n, k), dtype=torch.int8)
    rows = torch.randint(0, 255, (ROWS, k), dtype=torch.uint8)
    scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(weight, [ROWS, k])
    tail: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")

    def run() -> object:
        return torch.ops.onednn.qlinear_pointwise(rows, 0.1, 128, packed, scales, zeros, *tail)

    run()
    return run
