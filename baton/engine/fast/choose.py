"""A model as a compiled program: found in the store, or made and proved now."""

from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

import torch

from baton.engine.device import dtype_name
from baton.engine.fast import store
from baton.engine.fast.build import NoNative, build
from baton.engine.fast.errors import NotNative
from baton.engine.fast.forward import NativeRunner
from baton.engine.fast.program import Program, declare
from baton.kv.layout import KVLayout, LayerShape
from baton.model_files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compiled(
    files: ModelFiles,
    load: Callable[[], "PreTrainedModel"],
    *,
    weights: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
) -> tuple[NativeRunner, KVLayout]:
    """Its forward and the layout of its KV pool. `load` is called only if it has to be made.
    NotNative where there is no compiler, or the model is not one that can be."""
    try:
        library = declare(build(("program.cpp",), "program"))
    except NoNative as error:
        raise NotNative(str(error)) from error
    dtype = dtype_name(cache_dtype)

    def make(file: BinaryIO) -> None:
        from baton.engine.fast.compile import (
            compile_model,
        )  # with transformers, which takes seconds
        from baton.engine.probe import discover_layout

        model = load()
        layout = discover_layout(model, block_size, cache_dtype)
        compile_model(file, library, model, layout, weights)

    size = files.vocab_size * 4096  # a guess
    key = store.key_of(files, f"{dtype_name(weights)} {dtype}")
    with store.opened(key, make, size) as file:
        program = Program(library, file)
    layers = tuple(LayerShape(*each) for each in program.info["layers"])
    return NativeRunner(program), KVLayout(layers, block_size, dtype)
