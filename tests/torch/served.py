"""A folder as it is served: its logits by transformers, by our engine, and compiled."""

import ctypes
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from baton.engine.cpu.compile import compile_model
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.program import Program
from baton.engine.loading import load_model
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import self_test
from baton.model_files import resolve_model
from tests.torch.test_engine_parity import BLOCK, CPU, Case, run_in_chunks

LENGTHS = (29, 14, 37)


def texts(vocabulary: int) -> list[list[int]]:
    numbers = random.Random(5)
    return [[numbers.randrange(vocabulary) for _ in range(length)] for length in LENGTHS]


def check_logits(
    folder: Path, expected: Sequence[torch.Tensor], ids: list[list[int]], *,
    library: ctypes.CDLL | None = None,
) -> None:  # fmt: skip
    """The logits of every position of every text, within 1e-4, each way that we serve a model."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = [plain(torch.tensor([each]), use_cache=False).logits[0] for each in ids]
    model = load_model(resolve_model(str(folder)), CPU, torch.float32)
    layout = discover_layout(model, BLOCK, torch.float32)
    it = Case(model, Runner(model), layout, ids, theirs)
    self_test(it.runner, model, layout)
    ways = [theirs, run_in_chunks(it, (7, 99, 1), (0, 0, 3))]
    if library is not None:
        with tempfile.TemporaryFile() as file:
            compile_model(file, library, model, layout, torch.float32)
            native = replace(it, runner=NativeRunner(Program(library, file)))
        ways.append(run_in_chunks(native, (7, 99, 1), (0, 0, 3)))
    for found in ways:
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, atol=1e-4, rtol=0)
