"""Boot of a rank: every rank of a worker does the same, in the same order, and checks the same numbers.

The ranks load the model one after another: each one reads all of it into main memory, so that the memory
of the machine has to hold one whole model and the parts. The first rank also computes a few logits of the
whole model. Those of the divided one must agree, so a plan that does not fit an architecture's code is
refused by the model's name.
"""

from dataclasses import dataclass
from typing import Any

import torch

from baton.engine.boot import WEIGHTS, measure
from baton.engine.device import allocated, dtype_name, pick_dtype, set_up
from baton.engine.limits import own_logits
from baton.engine.probe import discover_layout
from baton.engine.rotary import check_rope
from baton.engine.runner import Runner
from baton.engine.selftest import compare, in_torch
from baton.errors import InputError, ModelError
from baton.host import release_memory
from baton.kv.layout import KVLayout
from baton.model_files import ModelFiles
from baton.pace import Pace
from baton.parallel.plan import plan_sharding
from baton.parallel.ranks import Ranks
from baton.parallel.shard import shard

TRIAL = 7
"""Tokens whose logits are compared: one forward of the whole model on the CPU, which may be large."""


@dataclass(frozen=True, slots=True)
class Booted:
    """One rank's part of a model, ready to run."""

    runner: Runner
    layout: KVLayout  # of the worker's pool: all heads
    part: KVLayout  # of this rank's
    dtype: str
    token_s: float
    pace: Pace
    weights: int  # bytes on a GPU


def boot_rank(files: ModelFiles, ranks: Ranks, *, dtype: str, block_size: int) -> Booted:
    """Load, cut, compare, test and measure. Raises ModelError, InputError, OutOfMemory."""
    if dtype in WEIGHTS:
        raise InputError(
            f"--dtype {dtype} and --tensor-parallel-size do not go together: use float32, bfloat16 or "
            "float16, or one rank"
        )
    set_up(ranks.device)
    kind = pick_dtype(dtype, ranks.device)
    for turn in range(ranks.size):
        if turn == ranks.rank:
            model, layout, expected = _load(files, ranks, kind, block_size)
        ranks.wait()
    ids = _trial(model)
    with torch.inference_mode():
        found = own_logits(model, ids, floor=len(ids), last=len(ids)).cpu()
    if expected is not None:
        compare(files.name, f"a forward divided among {ranks.size} ranks", found, expected, kind)
    runner, part = in_torch(model, kind, block_size)
    check_parts(files.name, layout, part, ranks.size)
    runner.backend += f", {ranks.size} ranks"
    token_s, pace = measure(runner, part)
    weights = allocated(ranks.device)
    return Booted(runner, layout, part, dtype_name(kind), token_s, pace, weights)


def check_parts(name: str, whole: KVLayout, part: KVLayout, ranks: int) -> None:
    """ModelError unless each rank has its share of the KV heads of every layer."""
    for layer, (all_, some) in enumerate(zip(whole.layers, part.layers, strict=True)):
        if some.kv_heads * ranks != all_.kv_heads:
            raise ModelError(
                f"{name} cannot be divided: layer {layer} has {all_.kv_heads} KV heads, and "
                f"{some.kv_heads} on each of {ranks} ranks; serve it without --tensor-parallel-size"
            )


def _load(
    files: ModelFiles, ranks: Ranks, dtype: torch.dtype, block_size: int
) -> tuple[Any, KVLayout, torch.Tensor | None]:
    """This rank's part on its device, the layout of the whole, and on the first rank logits of it."""
    from baton.engine.loading import load_model  # with transformers: seconds

    model = load_model(files, torch.device("cpu"), dtype)
    check_rope(files, model)
    plan = plan_sharding(model, ranks.size, files.name)
    layout = discover_layout(model, block_size, dtype)
    expected = None
    if ranks.rank == 0:
        ids = _trial(model)
        expected = own_logits(model, ids, floor=len(ids), last=len(ids))
    shard(model, plan, ranks)
    release_memory()
    return model.to(ranks.device), layout, expected


def _trial(model: Any) -> list[int]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return [(11 * i + 5) % vocabulary for i in range(TRIAL)]
