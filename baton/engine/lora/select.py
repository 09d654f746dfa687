"""Selects what runs a model with adapters: in torch, the fastest way that its device has.

A compiled program (baton/engine/cpu) and a recorded step (baton/engine/cuda) have no place for products
that differ from row to row, so neither is used.
"""

from collections.abc import Callable
from typing import Any

import torch

from baton.engine.lora.base import Base
from baton.engine.lora.runner import LoraRunner
from baton.engine.lora.shelf import LoraShelf
from baton.engine.lora.weights import read_products
from baton.engine.runner import Forward, Runner
from baton.kv.layout import KVLayout
from baton.model_files import ModelFiles


def with_adapters(
    files: ModelFiles,
    load: Callable[[], Any],
    *,
    device: torch.device,
    cache_dtype: torch.dtype,
    block_size: int,
) -> tuple[Forward, KVLayout]:
    """The model's forward with the adapters of `files`, and the layout of its KV pool. Raises ModelError,
    OutOfMemory."""
    model = load()
    base = Base.of(model)
    own = {each.adapter.digest: each for each in files.lora}
    found = {key: (each.adapter.name, read_products(each, base)) for key, each in own.items()}
    runner, layout = _plain(model, device, cache_dtype, block_size)
    adapted = LoraRunner(runner, {key: products for key, (_, products) in found.items()})
    adapted.prove(layout, found)
    if files.lora_updates is not None:
        adapted.shelf = LoraShelf(adapted, base, layout, folder=files.lora_updates, own=own)
        adapted.backend += " at the start"
    return adapted, layout


def _plain(
    model: Any, device: torch.device, cache_dtype: torch.dtype, block_size: int
) -> tuple[Runner, KVLayout]:
    if device.type == "cpu":
        from baton.engine.cpu.select import not_compiled

        return not_compiled(model, cache_dtype, block_size)
    if device.type == "cuda":
        from baton.engine.cuda.select import on_cuda

        forward, layout = on_cuda(
            model,
            weights=cache_dtype,
            cache_dtype=cache_dtype,
            block_size=block_size,
            decodes=False,
        )
        assert isinstance(forward, Runner), "nothing is recorded"
        return forward, layout
    from baton.engine.selftest import in_torch

    return in_torch(model, cache_dtype, block_size)
