"""The plain way to run any model on any device: transformers' code in torch, with our attention."""

import torch
from transformers import PreTrainedModel

from baton.engine.gather import GatherAttention
from baton.engine.probe import discover_layout
from baton.engine.runner import PlanKernel, Runner
from baton.engine.selftest import self_test
from baton.kv.layout import KVLayout


def in_torch(
    model: PreTrainedModel,
    cache_dtype: torch.dtype,
    block_size: int,
    plan_kernel: PlanKernel = GatherAttention,
) -> tuple[Runner, KVLayout]:
    """Its runner, once it has proved itself, and the layout of its KV pool."""
    layout = discover_layout(model, block_size, cache_dtype)
    runner = Runner(model, plan_kernel)
    self_test(runner, model, layout)
    return runner, layout
