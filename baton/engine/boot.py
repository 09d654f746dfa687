"""Boot: from a model's files to an engine that has proved itself and knows its own speed."""

import time
from dataclasses import dataclass

import torch

from baton.engine.device import dtype_name, pick_device, pick_dtype
from baton.engine.loading import load_model
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import self_test
from baton.kv.layout import KVLayout
from baton.kv.row import Row
from baton.model_files import ModelFiles

WARM_UP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Engine:
    """A model ready to run."""

    files: ModelFiles
    runner: Runner
    layout: KVLayout
    device: torch.device
    dtype: str
    token_s: float  # measured seconds of a token in a small prefill: a pessimistic figure

    def wait(self) -> None:
        """Until what was ordered is computed, so that its time is not counted as somebody else's."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def boot(files: ModelFiles, *, device: str, dtype: str, block_size: int) -> Engine:
    """Load, probe, self-test, warm up. Raises ModelError, InputError, OutOfMemory."""
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    model = load_model(files, torch_device, torch_dtype)
    layout = discover_layout(model, block_size, torch_dtype)
    runner = Runner(model)
    self_test(runner, model, layout)
    token_s = _measure(runner, layout)
    return Engine(files, runner, layout, torch_device, dtype_name(torch_dtype), token_s)


def _measure(runner: Runner, layout: KVLayout) -> float:
    """Seconds per token, from one small forward. It tells how long a step may be silent."""
    tokens = min(WARM_UP_TOKENS, layout.block_size)
    pool = Pool.private(layout, 1, runner.device)
    begun = time.perf_counter()
    runner.fill(pool, [Row([0] * tokens, 0, [0])])
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return (time.perf_counter() - begun) / tokens
