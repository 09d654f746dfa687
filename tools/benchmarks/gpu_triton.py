"""Attention of one layer on a GPU, by the Triton kernels and in torch: a section of gpu.py.

    python -m tools.benchmarks.gpu --only limits --only attention

Decode as a recorded step of sequences with 513 tokens, one more than a power of two, which is what the
gathered attention pads worst; and one chunk of a prompt behind three others. Layers of 256 MB in total
take turns, as in a model, so that no cache holds them. GB/s counts the keys and values that a step cannot
do without. Then the decode step again with other tunings: the fastest belongs into `Tuning`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from baton.engine.attention import AttentionParams, Kernel
from baton.engine.batch import pack
from baton.engine.cuda.graphs import (
    Again,
    Buffers,
    CudaGraphs,
    Recorder,
    StaticAttention,
    StepAttention,
)
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row
from tools.benchmarks.gpu_sections import BLOCK, Cell, Plan, attempt, timed

COLD_BYTES = 256e6
CONTEXT = 513
CHUNK, BEHIND = 2048, 6144
OTHERS = (
    *(dict(split=128), dict(split=512), dict(step=32), dict(step=128), dict(buffers=1)),
    *(dict(buffers=3), dict(split=128, step=32, buffers=3)),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer of a model."""

    heads: int
    layer: LayerShape

    @property
    def params(self) -> AttentionParams:
        """Without a window, softcap or sinks."""
        return AttentionParams(self.layer.key_dim**-0.5)


SHAPES = {
    "qwen2-0.5b": Shape(14, LayerShape(2, 64, 64)),
    "qwen2-7b": Shape(28, LayerShape(4, 128, 128)),
}


def attention(plan: Plan, shapes: dict[str, Shape] = SHAPES) -> Iterator[Cell]:
    """Every cell of this section. Fails with ImportError where triton is missing."""
    from baton.engine.cuda.triton_attention import TritonAttention, TritonSteps, Tuning

    batches = [batch for batch in plan.batches if batch in (1, 2, 64, 256)]
    for name, shape in shapes.items():
        for batch in batches:
            ways: dict[str, StepAttention] = {"triton": TritonSteps(), "torch": StaticAttention()}
            for way, steps in ways.items():
                run = partial(decode, plan, shape, batch, steps)
                yield attempt(f"{name} attention of {batch} by {way}", run)
        makers: dict[str, Callable[..., Kernel]]
        makers = {"triton": TritonAttention, "torch": GatherAttention}
        for way, make in makers.items():
            yield attempt(
                f"{name} attention of a chunk by {way}", partial(chunk, plan, shape, make)
            )
    for name, shape in shapes.items():
        for batch in batches[:2]:
            for other in OTHERS:
                tuning = replace(Tuning(), step_bytes=160 << 10, **other)
                run = partial(decode, plan, shape, batch, TritonSteps(tuning))
                changed = ", ".join(f"{what} {value}" for what, value in other.items())
                yield attempt(f"{name} attention of {batch} with {changed}", run)


def decode(plan: Plan, shape: Shape, batch: int, steps: StepAttention) -> dict[str, float]:
    """One layer of a recorded step."""
    context = CONTEXT if plan.device.type == "cuda" else plan.context
    pool, tables = filled(plan, shape, [context] * batch)
    rows = [Row([0], context - 1, table) for table in tables]
    width = steps.width([len(table) for table in tables])
    assert width is not None
    buffers = Buffers(batch, width, plan.device)
    buffers.load(rows, BLOCK)
    steps.begin(rows, BLOCK)
    kernel = steps.kernel(buffers.batch, BLOCK)
    seconds = per_layer(plan, shape, pool, kernel, batch)
    read = batch * context * pool.layout.block_bytes / BLOCK / len(pool.keys)
    return {"ms": 1e3 * seconds, "GB/s": read / seconds / 1e9}


def chunk(plan: Plan, shape: Shape, make: Callable[..., Kernel]) -> dict[str, float]:
    """One layer of a chunk of a prompt. It is not recorded, so launches count where they take longer."""
    tokens, behind = (CHUNK, BEHIND) if plan.device.type == "cuda" else (plan.context, plan.context)
    pool, tables = filled(plan, shape, [tokens + behind])
    batch = pack([Row([0] * tokens, behind, tables[0])], BLOCK, plan.device)
    seconds = per_layer(plan, shape, pool, make(batch, BLOCK), tokens, recorded=False)
    pairs = tokens * behind + tokens * (tokens + 1) / 2
    flops = 2 * pairs * shape.heads * (shape.layer.key_dim + shape.layer.value_dim)
    return {"ms": 1e3 * seconds, "TFLOP/s": flops / seconds / 1e12}


def filled(plan: Plan, shape: Shape, contexts: Sequence[int]) -> tuple[Pool, list[list[int]]]:
    """A pool of random numbers, and each sequence's blocks, in random order."""
    needed = [-(-context // BLOCK) for context in contexts]
    dtype = str(plan.torch_dtype).removeprefix("torch.")
    one = KVLayout((shape.layer,), BLOCK, dtype)
    layers = min(24, 1 + int(COLD_BYTES / (sum(needed) * one.block_bytes)))
    if plan.device.type == "cpu":
        layers = 1
    layout = KVLayout((shape.layer,) * layers, BLOCK, dtype)
    pool = Pool.private(layout, sum(needed), plan.device)
    for part in (*pool.keys, *pool.values):
        part.normal_()
    order = random.Random(0).sample(range(sum(needed)), sum(needed))
    return pool, [[order.pop() for _ in range(blocks)] for blocks in needed]


def per_layer(
    plan: Plan, shape: Shape, pool: Pool, kernel: Kernel, tokens: int, *, recorded: bool = True
) -> float:
    """Median seconds of one layer, all layers of the pool one after the other."""
    query = torch.randn(tokens, shape.heads, shape.layer.key_dim, device=plan.device)
    query = query.to(plan.torch_dtype)

    def run() -> None:
        for layer in range(len(pool.keys)):
            kernel(query, pool, layer, shape.params)

    if recorded:
        on_card = plan.device.type == "cuda"
        recorder: Recorder = CudaGraphs(plan.device) if on_card else Again()
        return timed(recorder.record(run), plan.device, plan.rounds) / len(pool.keys)
    return timed(run, plan.device, plan.rounds) / len(pool.keys)
