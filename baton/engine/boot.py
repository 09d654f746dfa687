"""Boot: from a model's files to an engine that has proved itself and knows its own speed."""

import logging
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from baton.engine.device import dtype_name, pick_device, pick_dtype
from baton.engine.pool import Pool
from baton.engine.runner import Forward, Runner
from baton.errors import InputError
from baton.kv.layout import KVLayout
from baton.kv.row import Row
from baton.model_files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """A model ready to run."""

    files: ModelFiles
    runner: Forward
    layout: KVLayout
    device: torch.device
    dtype: str
    token_s: float  # measured seconds of a token in a small prefill: a pessimistic figure

    def wait(self) -> None:
        """Until what was ordered is computed, so that its time is not counted as somebody else's."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def boot(files: ModelFiles, *, device: str, dtype: str, block_size: int) -> Engine:
    """Load, probe, self-test, warm up. Raises ModelError, InputError, OutOfMemory. The dtype
    "int8" is that of the weights; the rest is then computed in fp32, with a KV cache in bf16."""
    torch_device = pick_device(device)
    cache_dtype = pick_dtype("bfloat16" if dtype == "int8" else dtype, torch_device)
    weights = torch.int8 if dtype == "int8" else cache_dtype
    forward, layout = _forward(files, torch_device, weights, cache_dtype, block_size)
    token_s = _measure(forward, layout)
    return Engine(files, forward, layout, torch_device, dtype_name(weights), token_s)


def _forward(
    files: ModelFiles,
    device: torch.device,
    weights: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
) -> tuple[Forward, KVLayout]:
    """Compiled where that can be, else in torch. transformers is imported only if it is needed:
    that takes seconds."""

    @cache
    def load() -> "PreTrainedModel":
        from baton.engine.loading import load_model

        return load_model(files, device, cache_dtype)

    why = f"it is on {device}"
    if device.type == "cpu":
        from baton.engine.fast.choose import compiled
        from baton.engine.fast.errors import NotNative

        try:
            return compiled(
                files, load, weights=weights, cache_dtype=cache_dtype, block_size=block_size
            )
        except NotNative as error:
            why = str(error)
            logger.warning("%s runs in torch: %s", files.name, why)
    if weights == torch.int8:
        raise InputError(f"{files.name} cannot have int8 weights: {why}; use another dtype")
    from baton.engine.probe import discover_layout
    from baton.engine.selftest import self_test

    model = load()
    layout = discover_layout(model, block_size, cache_dtype)
    runner = Runner(model)
    self_test(runner, model, layout)
    return runner, layout


def _measure(runner: Forward, layout: KVLayout) -> float:
    """Seconds per token, from one small forward. It tells how long a step may be silent."""
    tokens = min(WARM_UP_TOKENS, layout.block_size)
    pool = Pool.private(layout, 1, runner.device)
    begun = time.perf_counter()
    runner.fill(pool, [Row([0] * tokens, 0, [0])])
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return (time.perf_counter() - begun) / tokens
