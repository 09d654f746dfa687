"""What this machine can do at most: bytes read a second, and multiplications a second.

Both are taken the same way in every run of a benchmark, beside its arms: on a shared machine they
move, and a share of last week's limit says nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.dtypes import INT8_WEIGHT_ONLY

BUFFER = 512 << 20  # bytes: no cache holds them
ROWS = 1024  # of the large products
SHAPES = ((3072, 768), (4864, 896))  # [N, K]


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


def measure() -> Limits:
    """A few seconds on all of torch's threads."""
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64)
    read = BUFFER / best(buffer.sum) / 1e9
    rates = {name: max(_rate(name, n, k) for n, k in SHAPES) for name in ("float32", "bfloat16")}
    rates["int8"] = max(_int8_rate(n, k) for n, k in SHAPES)
    rates[INT8_WEIGHT_ONLY] = rates["bfloat16"]  # its bytes are multiplied as such
    return Limits(read, rates)


def _rate(dtype: str, n: int, k: int) -> float:
    """Of a linear whose weight oneDNN has packed, where this torch can; else of torch's own."""
    kind = getattr(torch, dtype)
    rows, weight = torch.randn(ROWS, k).to(kind), torch.randn(n, k).to(kind)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

        def run() -> object:
            return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")

        run()
    except (RuntimeError, AttributeError):

        def run() -> object:
            return torch.nn.functional.linear(rows, weight)

    return 2.0 * ROWS * n * k / best(run) / 1e9


def _int8_rate(n: int, k: int) -> float:
    """Of oneDNN's int8 linear, where this torch has it; else that of two bf16 rates, a guess."""
    try:
        weight = torch.randint(-127, 127, (n, k), dtype=torch.int8)
        rows = torch.randint(0, 255, (ROWS, k), dtype=torch.uint8)
        scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
        packed = torch.ops.onednn.qlinear_prepack(weight, [ROWS, k])
        tail: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")

        def run() -> object:
            return torch.ops.onednn.qlinear_pointwise(rows, 0.1, 128, packed, scales, zeros, *tail)

        return 2.0 * ROWS * n * k / best(run) / 1e9
    except (RuntimeError, AttributeError, TypeError):
        return 2 * _rate("bfloat16", n, k)
