"""Selects how a model runs on a GPU: decode steps as CUDA graphs, attention by FlashInfer if it is
installed and supports the model, else by our Triton kernels, else in torch; FP8 weights on request. At
boot each must reproduce the results of the plain runner on this card; otherwise it is not used, and
`backend` names the reason.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from baton.engine.cuda.fp8 import FP8, Product, in_fp8, quantize_linears
from baton.engine.cuda.graphs import Again, CudaGraphs, GraphRunner, Recorder, StaticAttention
from baton.engine.errors import Unsupported
from baton.engine.pool import Pool
from baton.engine.rotary import VARYING
from baton.engine.runner import Forward, Runner
from baton.engine.selftest import TOLERANCE, compare, distances, in_torch
from baton.errors import InputError, ModelError, OutOfMemory
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row

TRIAL_STEPS = ((0, 1, 2), (1,), (0, 1, 2), (2, 0))  # sequences per step, padded or not
REASONS = (
    *(Unsupported, ModelError, OutOfMemory, RuntimeError, ValueError, TypeError, AttributeError),
    *(LookupError, ImportError, OSError, AssertionError),
)
"""What a library may raise if it does not support this card, torch version or model."""

Way = tuple[str, Callable[[], GraphRunner]]


def on_cuda(
    model: Any,
    *,
    weights: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
    decodes: bool = True,
) -> tuple[Forward, KVLayout]:
    """The model's forward and the layout of its KV pool. Without `decodes` no step is recorded. Raises
    ModelError, and InputError for FP8 weights without a linear layer to apply them to."""
    device = next(model.parameters()).device
    torch.cuda.set_device(device)  # libraries launch on the current one
    plain, layout = in_torch(model, cache_dtype, block_size)
    if weights == FP8:
        with_fp8(plain, layout, in_fp8)
    graphs: Callable[[], Recorder] = partial(CudaGraphs, device) if decodes else Again
    ways: list[Way] = [
        ("Triton", lambda: with_triton(plain, layout, graphs)),
        ("torch", lambda: GraphRunner(plain, StaticAttention(), graphs)),
    ]
    if find_spec("flashinfer"):
        ways.insert(0, ("FlashInfer", lambda: with_flashinfer(plain, graphs)))
    chosen = fastest(plain, layout, ways)
    if not decodes and isinstance(chosen, GraphRunner):
        return chosen.plain, layout
    return chosen, layout


def with_flashinfer(plain: Runner, make_recorder: Callable[[], Recorder]) -> GraphRunner:
    """FlashInfer for recorded steps and for all other forwards."""
    from baton.engine.cuda.flashinfer_attention import VERSION, FlashInferAttention

    attention = FlashInferAttention(plain.device)
    runner = Runner(plain.model, attention.ragged)
    runner.backend = f"{plain.backend}, FlashInfer {VERSION}"
    return GraphRunner(runner, attention, make_recorder)


def with_triton(
    plain: Runner, layout: KVLayout, make_recorder: Callable[[], Recorder]
) -> GraphRunner:
    """Our Triton kernels for recorded steps and for all other forwards. ImportError without triton."""
    from baton.engine.cuda import triton_check

    return triton_check.with_triton(plain, layout, make_recorder)


def with_fp8(plain: Runner, layout: KVLayout, product: Product) -> None:
    """Quantize the runner's model and compare its logits with those before. Raises ModelError if they
    differ too much, InputError if no layer can be quantized."""
    before = trial(plain, layout)
    if not quantize_linears(plain.model, product):
        raise InputError(
            f"{type(plain.model).__name__} has no linears that support fp8 weights: use another dtype"
        )
    compare(type(plain.model).__name__, "fp8", trial(plain, layout), before, FP8)
    plain.backend = f"{plain.backend}, fp8 weights"


def fastest(plain: Runner, layout: KVLayout, ways: Sequence[Way]) -> Forward:
    """The first way whose logits agree with those of `plain`; otherwise `plain`."""
    if plain.rotary is not None:  # a recording would keep the rope lengths of its first step
        plain.backend += f", no graphs: {VARYING}"
        return plain
    expected = trial(plain, layout)
    passed_over = []
    for name, make in ways:
        try:
            runner = make()
            off = float(distances(trial(runner, layout), expected).max())
            if not off <= TOLERANCE[plain.model.dtype]:  # also rejects NaN
                raise ModelError(f"its logits differ by {off:.1%} of the largest")
            if runner.failure or not runner.replayed:
                raise ModelError(runner.failure or "no step was recorded")
        except REASONS as error:
            why = (str(error).splitlines() or [""])[0] or type(error).__name__
            passed_over.append(f"not with graphs and {name} attention: {why}")
            continue
        runner.forget()
        runner.backend = "; ".join([f"{runner.plain.backend}, CUDA graphs", *passed_over])
        return runner
    plain.backend = "; ".join([plain.backend, *passed_over])
    return plain


def trial(runner: Forward, layout: KVLayout) -> torch.Tensor:
    """Logits of a few decode steps, [rows of all steps, vocabulary]: three sequences that join and
    leave, one of which crosses a block boundary."""
    lengths = (layout.block_size - 1, 1, 5)
    each = layout.blocks_for(max(lengths) + len(TRIAL_STEPS))
    pool = Pool.private(layout, each * len(lengths), runner.device, spare=True)
    tables = [[each * i + each - 1 - j for j in range(each)] for i in range(len(lengths))]
    texts = [[(5 * i + 3 * j) % 32 for j in range(length)] for i, length in enumerate(lengths)]
    prompts = [Row(t, 0, blocks) for t, blocks in zip(texts, tables, strict=True) if t]
    runner.fill(pool, prompts)
    found = []
    for step, present in enumerate(TRIAL_STEPS):
        rows = [Row([7 + step], len(texts[i]), tables[i], Logits.LAST) for i in present]
        found.append(runner.run(pool, rows).clone())  # the next run overwrites them
        for i in present:
            texts[i].append(7 + step)
    return torch.cat(found)
