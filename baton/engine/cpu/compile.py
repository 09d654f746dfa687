"""The compiler pipeline: capture, lower, plan memory, assemble, and test against transformers."""

import ctypes
import logging
from typing import BinaryIO

import torch
from transformers import PreTrainedModel

from baton.engine.cpu import operations, views  # noqa: F401  registers the handlers
from baton.engine.cpu.assemble import assemble
from baton.engine.cpu.capture import Captured, capture
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.layout import MemoryPlan, lay_out
from baton.engine.cpu.lower import lower
from baton.engine.cpu.program import Program
from baton.engine.errors import CompileError, unexpected
from baton.engine.selftest import self_test
from baton.errors import ModelError
from baton.kv.layout import KVLayout

logger = logging.getLogger(__name__)

MIXTURE = (
    "it is a mixture of experts: products whose weights each token chooses are not compiled yet"
)


def compile_model(
    file: BinaryIO,
    library: ctypes.CDLL,
    model: PreTrainedModel,
    layout: KVLayout,
    weights: torch.dtype,
) -> None:
    """Write the model's program to `file`. CompileError if the model cannot be compiled, or the
    program fails the self-test. `weights`: the dtype of the packed weights, a key of WEIGHTS."""
    captured, plan = _planned(model)
    assemble(
        file,
        library,
        plan,
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


def _planned(model: PreTrainedModel) -> tuple[Captured, MemoryPlan]:
    """The traced model and its plan. An error that nobody expected means that the model cannot be
    compiled, not that it cannot be served: torch may run what the compiler does not understand."""
    try:
        captured = capture(model)
        return captured, lay_out(lower(captured))
    except MemoryError:
        raise
    except CompileError as error:
        if any(weight.ndim == 3 for weight in model.parameters()):  # [experts, n, k]
            raise CompileError(MIXTURE) from error
        raise
    except Exception as error:
        logger.exception("the compiler failed on %s", type(model).__name__)
        raise CompileError(f"the compiler failed with {unexpected(error)}") from error
