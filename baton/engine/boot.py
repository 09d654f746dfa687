"""Boot: from a model's files to an engine that has passed its self-test and measured its speed."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch

from baton.adapters.below import FLAG
from baton.dtypes import FP8, INT8, INT8_WEIGHT_ONLY
from baton.engine.device import (
    dtype_name,
    pick_device,
    pick_dtype,
    pick_kv_dtype,
    refuse_without_fp8,
    set_up,
)
from baton.engine.errors import Result, unexpected
from baton.engine.pool import Pool
from baton.engine.pools import OnePool, Pools
from baton.engine.rotary import check_rope
from baton.engine.runner import Forward
from baton.errors import BatonError, InputError, ModelError, OutOfMemory
from baton.host import release_memory
from baton.kv.layout import KVLayout
from baton.kv.row import Row
from baton.memory import out_of_memory
from baton.model_files import ModelFiles
from baton.pace import Pace
from baton.wire.shelf import Shelf

WARM_UP_TOKENS = 32
WEIGHTS = {INT8: torch.int8, INT8_WEIGHT_ONLY: torch.qint8, FP8: torch.float8_e4m3fn}
"""Dtypes of the weights only. qint8 is never a tensor's dtype; it stands for int8 weights, bf16 rows."""


logger = logging.getLogger(__name__)


@runtime_checkable
class Recording(Protocol):
    """A forward that records decode steps (cuda/graphs.py)."""

    draft_rows: int | None

    def prepare(self, pool: Pool, most_rows: int, most_tokens: int) -> None:
        """Record what steps over this pool need; nothing is recorded later."""


@runtime_checkable
class Adaptable(Protocol):
    """A forward whose adapters come and go (lora/runner.py)."""

    shelf: Shelf | None


@dataclass(frozen=True, slots=True)
class Engine:
    """A model ready to run."""

    files: ModelFiles
    runner: Forward
    layout: KVLayout
    device: torch.device
    dtype: str
    token_s: float  # seconds per token of a small prefill: a pessimistic estimate
    pace: Pace  # the first estimate of how long forwards take
    pools: Pools

    def prepare(self, pool: Pool, most_rows: int, most_tokens: int) -> None:
        """Do before serving from this pool what would delay a step: at most `most_rows` sequences of
        `most_tokens` tokens. Nothing where steps are not recorded."""
        if isinstance(self.runner, Recording):
            self.runner.prepare(pool, most_rows, most_tokens)

    @property
    def shelf(self) -> Shelf | None:
        """Of adapters that come and go; None: they do not."""
        return self.runner.shelf if isinstance(self.runner, Adaptable) else None

    @property
    def draft_rows(self) -> int | None:
        """With more sequences in a step drafts cost more than they save. None: no limit."""
        return self.runner.draft_rows if isinstance(self.runner, Recording) else None

    def wait(self) -> None:
        """Wait for queued GPU work, so that its time is not attributed to the next step."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def boot(
    files: ModelFiles,
    *,
    device: str,
    dtype: str,
    block_size: int,
    kv_dtype: str = "auto",
    decodes: bool = True,
) -> Engine:
    """Load, probe, self-test, warm up. Raises ModelError, InputError, OutOfMemory. With a dtype of
    WEIGHTS the KV cache is bf16 and the other computation fp32 on a CPU, bf16 on a GPU. `kv_dtype`: one
    of KV_DTYPES. `decodes`: False for a worker that only fills, whose steps are not recorded.

    The code of hundreds of architectures runs here for the first time. An error that nobody expected is a
    ModelError too, because the next attempt would end in the same way; its traceback goes to the log."""
    return sorted_out(
        files, lambda: _boot(files, device, dtype, block_size, kv_dtype, decodes=decodes)
    )


def sorted_out(files: ModelFiles, load: Callable[[], Result]) -> Result:
    """What `load` returns, and its errors as boot() raises them."""
    try:
        return load()
    except BatonError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory(
                f"{files.name} does not fit the memory: {unexpected(error)}"
            ) from error
        logger.exception("%s cannot be loaded", files.name)
        raise ModelError(
            f"{files.name} cannot be served here: its first forwards end with {unexpected(error)}; "
            "the traceback is in the log: please report it, or use another model"
        ) from error


def _boot(
    files: ModelFiles, device: str, dtype: str, block_size: int, kv_dtype: str, *, decodes: bool
) -> Engine:
    torch_device = pick_device(device)
    set_up(torch_device)
    computed = pick_dtype("bfloat16" if dtype in WEIGHTS else dtype, torch_device)
    cache_dtype = pick_kv_dtype(kv_dtype, computed, torch_device)
    weights = WEIGHTS.get(dtype, computed)
    forward, layout = _forward(
        files, torch_device, weights, computed, cache_dtype, block_size, decodes
    )
    token_s, pace = measure(forward, layout)
    name = dtype if dtype in WEIGHTS else dtype_name(weights)
    pools = OnePool(layout, torch_device)
    return Engine(files, forward, layout, torch_device, name, token_s, pace, pools)


def _forward(
    files: ModelFiles,
    device: torch.device,
    weights: torch.dtype,
    computed: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
    decodes: bool,
) -> tuple[Forward, KVLayout]:
    """The fastest forward for this model on this device. Only `load` imports transformers, which takes
    seconds, and a stored program does not need it."""

    @cache
    def load() -> Any:
        from baton.engine.loading import load_model

        model = load_model(files, device, computed)
        check_rope(files, model)
        return model

    try:
        return _fastest(files, load, device, weights, cache_dtype, block_size, decodes)
    finally:
        if load.cache_info().currsize:
            load.cache_clear()
            release_memory()


def _fastest(
    files: ModelFiles,
    load: Callable[[], Any],
    device: torch.device,
    weights: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
    decodes: bool,
) -> tuple[Forward, KVLayout]:
    fast = find_spec("baton.engine.cpu") is not None
    if files.adaptable:
        refuse_narrow(weights, "--lora" if files.lora else FLAG)
        from baton.engine.lora.select import with_adapters

        return with_adapters(
            files, load, device=device, cache_dtype=cache_dtype, block_size=block_size
        )
    if weights == WEIGHTS[FP8]:
        refuse_without_fp8(device)
    if device.type == "cpu" and fast:
        from baton.engine.cpu.select import on_cpu

        return on_cpu(files, load, weights=weights, cache_dtype=cache_dtype, block_size=block_size)
    if weights in (WEIGHTS[INT8], WEIGHTS[INT8_WEIGHT_ONLY]) and device.type != "cpu":
        raise InputError(f"int8 weights need a CPU, got {device}: use another dtype")
    if device.type == "cuda" and fast:
        from baton.engine.cuda.select import on_cuda

        return on_cuda(
            load(), weights=weights, cache_dtype=cache_dtype, block_size=block_size, decodes=decodes
        )
    if weights in WEIGHTS.values():
        raise InputError(
            "int8 and fp8 weights need baton/engine/cpu and baton/engine/cuda, which are not there"
        )
    from baton.engine.selftest import in_torch

    return in_torch(load(), cache_dtype, block_size)


def refuse_narrow(weights: torch.dtype, flag: str) -> None:
    """InputError for weights that only compiled programs and FP8 products have. `flag`: what asks for
    adapters."""
    if weights in WEIGHTS.values():
        names = ", ".join(WEIGHTS)
        raise InputError(
            f"{flag} does not work with --dtype {names}: adapters run beside weights of full width; "
            "leave one of the two out"
        )


def measure(runner: Forward, layout: KVLayout) -> tuple[float, Pace]:
    """Seconds per token of the first small forward, which bounds how long a step may take without a
    heartbeat, and the pace of those after it: the first one also loads kernels and pages."""
    tokens = min(WARM_UP_TOKENS, layout.block_size)
    pool = Pool.private(layout, 1, runner.device)

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        runner.fill(pool, [Row([0] * count, 0, [0])])
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        return time.perf_counter() - begun

    first_s = seconds(tokens)
    return first_s / tokens, Pace.measured(seconds(1), seconds(tokens), tokens)
