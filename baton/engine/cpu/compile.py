"""The compiler pipeline: capture, lower, plan memory, assemble, and test against transformers."""

import ctypes
from typing import BinaryIO

import torch
from transformers import PreTrainedModel

from baton.engine.cpu import operations, views  # noqa: F401  registers the handlers
from baton.engine.cpu.assemble import assemble
from baton.engine.cpu.capture import capture
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.layout import lay_out
from baton.engine.cpu.lower import lower
from baton.engine.cpu.program import Program
from baton.engine.errors import CompileError
from baton.engine.selftest import self_test
from baton.errors import ModelError
from baton.kv.layout import KVLayout


def compile_model(
    file: BinaryIO,
    library: ctypes.CDLL,
    model: PreTrainedModel,
    layout: KVLayout,
    weights: torch.dtype,
) -> None:
    """Write the model's program to `file`. CompileError if the model cannot be compiled, or the
    program fails the self-test. `weights`: the dtype of the packed weights, a key of WEIGHTS."""
    captured = capture(model)
    assemble(
        file,
        library,
        lay_out(lower(captured)),
        captured.layer_params,
        layout,
        weights=weights,
        threads=torch.get_num_threads(),
        info={"layers": [[s.kv_heads, s.key_dim, s.value_dim] for s in layout.layers]},
    )
    try:
        self_test(NativeRunner(Program(library, file)), model, layout, weights=weights)
    except ModelError as error:
        raise CompileError(str(error)) from error
