"""Selects how a model runs on a CPU: as a compiled program from the store, or compiled and tested now.
If that fails it runs in torch, with native attention and packed linears if they are available.
"""

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch

from baton.engine.cpu import store
from baton.engine.cpu.build import NoNative, build, program_sources
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.program import Program, declare
from baton.engine.cpu.structures import CACHES, SCALED, TYPES, WEIGHTS
from baton.engine.device import dtype_name
from baton.engine.errors import CompileError
from baton.engine.pool import Pool
from baton.engine.rotary import VARYING
from baton.engine.runner import Forward, Runner
from baton.errors import InputError, ModelError
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Logits, Row
from baton.model_files import ModelFiles

logger = logging.getLogger(__name__)


def on_cpu(
    files: ModelFiles,
    load: Callable[[], Any],
    *,
    weights: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
) -> tuple[Forward, KVLayout]:
    """The model's forward and the layout of its KV pool. `load` is called only if the model is needed.
    InputError if int8 weights are wanted and it cannot be compiled."""
    try:
        return compiled(
            files, load, weights=weights, cache_dtype=cache_dtype, block_size=block_size
        )
    except CompileError as error:
        if weights in SCALED:
            raise InputError(
                f"{files.name} cannot have int8 weights: {error}; use another dtype"
            ) from error
        why = str(error).splitlines()[0]
        logger.info("%s is not compiled and runs in torch: %s", files.name, error)
    runner, layout = not_compiled(load(), cache_dtype, block_size)
    runner.backend = f"in torch, not compiled: {why}"
    return runner, layout


def not_compiled(model: Any, cache_dtype: torch.dtype, block_size: int) -> tuple[Runner, KVLayout]:
    """The model in torch, with native attention and packed linears where there are such."""
    from baton.engine.cpu.kernel import cpu_attention
    from baton.engine.cpu.packed import pack_linears
    from baton.engine.selftest import in_torch

    runner, layout = in_torch(model, cache_dtype, block_size, cpu_attention())
    if pack_linears(model):
        _check_packed(type(model).__name__, runner, layout)
    return runner, layout


def _check_packed(name: str, runner: Forward, layout: KVLayout) -> None:
    """ModelError if the model reads the numbers of a weight that is packed now: they are NaN."""
    pool = Pool.private(layout, 1, runner.device)
    if not runner.run(pool, [Row([0], 0, [0], Logits.LAST)]).isfinite().all():
        raise ModelError(
            f"{name} cannot be served on a CPU: its code reads weights of linears itself, and they "
            "are packed; please report it, and use another model"
        )


def compiled(
    files: ModelFiles,
    load: Callable[[], Any],
    *,
    weights: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
) -> tuple[NativeRunner, KVLayout]:
    """See on_cpu. CompileError if there is no compiler, or the model cannot be compiled."""
    if files.rope.varies:
        raise CompileError(VARYING)
    if weights not in WEIGHTS:
        raise CompileError(f"{dtype_name(weights)} has no native matrix product")
    dtype = dtype_name(cache_dtype)

    def make(file: BinaryIO) -> None:
        with ThreadPoolExecutor(1) as beside:
            library = beside.submit(_library, weights, dtype)  # compiles while the model loads
            model = load()
            from baton.engine.cpu.compile import (
                compile_model,  # after load() has imported transformers
            )
            from baton.engine.probe import discover_layout

            layout = discover_layout(model, block_size, cache_dtype)
            compile_model(file, library.result(), model, layout, weights)

    key = store.key_of(files, f"{dtype_name(weights)} {dtype}")
    program = None
    while program is None:
        with store.opened(key, make, store.about_bytes(files)) as file:
            try:
                program = Program(_library(weights, dtype), file)
            except ValueError as error:  # the file was damaged after it was written
                logger.warning(
                    "the stored program of %s is damaged and is compiled again: %s",
                    files.name,
                    error,
                )
                store.forget(key)
    layers = tuple(LayerShape(*each) for each in program.info["layers"])
    return NativeRunner(program), KVLayout(layers, block_size, dtype)


def _library(weights: torch.dtype, cache_dtype: str) -> ctypes.CDLL:
    kinds = (
        [weights, torch.float32] if weights in SCALED else [weights]
    )  # routers are not quantized
    sources = program_sources([TYPES[WEIGHTS[e]] for e in kinds], [TYPES[CACHES[cache_dtype]]])
    try:
        return declare(build(sources, f"program-{dtype_name(weights)}"))
    except NoNative as error:
        raise CompileError(str(error)) from error
