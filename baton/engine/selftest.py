"""Self-test at load: the model with the paged pool and attention against its own eager attention.

Some architectures use transformers' attention interface and still give wrong results, and no flag of
transformers indicates it. So every model is tested on two short sequences of different lengths, in
the three kinds of forward that occur:

    forward 1   prefill   A 0..9          B 0..2
    forward 2   mixed     A 10..end (the next chunk, over a block's edge)    B 3 (decode)
    forward 3   decode    A               B

The batches run twice, the second time with B first, because a model must keep no state. Then every length
is crossed at which the config changes what is computed (limits.py).
"""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from baton.engine.device import dtype_name
from baton.engine.gather import GatherAttention
from baton.engine.limits import crossed, own_logits, rotated
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Forward, PlanKernel, Runner
from baton.errors import ModelError
from baton.kv.layout import INT8, KVLayout
from baton.kv.row import Logits, Row

FORWARDS = {"prefill": Logits.ALL, "a mixed batch": Logits.LAST, "decode": Logits.ALL}
# The largest allowed difference, relative to the largest logit of the position.
TOLERANCE = {
    **{torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2},
    **{torch.int8: 0.25, torch.qint8: 0.2, torch.float8_e4m3fn: 0.25, torch.uint8: 0.1},
}
NARROW = torch.uint8  # never a tensor's dtype here; it stands for a KV cache in int8


@dataclass(frozen=True, slots=True)
class Text:
    """A test sequence, the positions that cut it into three forwards, and its blocks."""

    token_ids: list[int]
    cuts: tuple[int, int, int, int]
    blocks: list[int]


def self_test(
    runner: Forward,
    model: PreTrainedModel,
    layout: KVLayout,
    *,
    weights: torch.dtype | None = None,
) -> None:
    """ModelError if the runner's logits differ from the model's own beyond TOLERANCE. `weights`: the
    dtype of the runner's weights, if it is not the model's."""
    size, vocabulary = layout.block_size, model.config.get_text_config(decoder=True).vocab_size
    ids = [(7 * i + 3) % vocabulary for i in range(size + 4)]
    backwards = list(reversed(range(layout.blocks_for(size + 4))))
    texts = [
        Text(ids, (0, min(10, size), size + 3, size + 4), backwards),
        Text(ids[-5:], (0, 3, 4, 5), [len(backwards) + i for i in range(layout.blocks_for(5))]),
    ]
    pool = Pool.private(layout, len(backwards) + len(texts[1].blocks), runner.device)
    lengths = [len(text.token_ids) for text in texts]
    own = [
        own_logits(model, text.token_ids, floor=length, last=length)
        for text, length in zip(texts, lengths, strict=True)
    ]
    pairs = list(zip(texts, own, strict=True))
    name, dtype = type(model).__name__, weights or model.dtype
    if layout.dtype == INT8:
        dtype = max(dtype, NARROW, key=TOLERANCE.__getitem__)
    for order in (pairs, pairs[::-1]):
        for forward, (what, logits) in enumerate(FORWARDS.items()):
            rows, expected = [], []
            for text, theirs in order:
                start, end = text.cuts[forward : forward + 2]
                ids, whole = text.token_ids[start:end], len(text.token_ids)
                rows.append(Row(ids, start, text.blocks, logits, rope_floor=whole))
                expected.append(theirs[start if logits is Logits.ALL else end - 1 : end])
            compare(name, what, runner.run(pool, rows), torch.cat(expected), dtype)
    for what, ours, theirs in rotated(model):
        compare(name, what, ours, theirs, torch.float32, values="values")
    for what, ours, theirs in crossed(runner, model, layout):
        compare(name, what, ours, theirs, dtype)


def distances(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[positions]: the largest difference of two logits, relative to the largest logit."""
    return (ours - theirs).abs().amax(dim=-1) / theirs.abs().amax(dim=-1).clamp_min(1e-6)


def compare(
    name: str,
    what: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    dtype: torch.dtype,
    values: str = "logits",
) -> None:
    """Raise ModelError if the logits differ too much. In fp32 every position must agree, in half
    precision half of them: rounding alone may route a token to another expert of a mixture."""
    if theirs.isnan().any():
        raise ModelError(
            f"{name} cannot be served: in {what} the model's own {values} are NaN, which is not a "
            f"number, in {dtype_name(dtype)}; correct its config.json, or fetch the model again, or "
            "try float32"
        )
    off = distances(ours, theirs)
    error = float(off.max() if dtype == torch.float32 else off.nanmedian())
    if not error <= TOLERANCE[dtype] or not off.isfinite().all():
        raise ModelError(
            f"{name} cannot be served: it fails the self-test, in {what} our {values} differ from "
            f"the model's own by {error:.1%} of the largest, {TOLERANCE[dtype]:.1%} are allowed"
        )


def in_torch(
    model: PreTrainedModel,
    cache_dtype: torch.dtype,
    block_size: int,
    plan_kernel: PlanKernel = GatherAttention,
) -> tuple[Runner, KVLayout]:
    """Run any model on any device in torch: a runner that has passed the self-test, and the layout of
    its KV pool. Raises ModelError."""
    layout = discover_layout(
        model, block_size, model.dtype if cache_dtype == torch.int8 else cache_dtype
    )
    runner = Runner(model, plan_kernel)
    self_test(runner, model, layout)
    if cache_dtype == torch.int8:  # once more: here rounding hides small mistakes
        layout = replace(layout, dtype=INT8)
        self_test(runner, model, layout)
    return runner, layout
