"""Loading a model: what goes wrong is told, and what nobody needs any more is given back."""

import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from baton.engine import boot as boot_module
from baton.engine import loading
from baton.engine.boot import boot
from baton.engine.errors import CompileError
from baton.errors import ModelError, OutOfMemory
from baton.host import release_memory
from baton.model_files import resolve_model
from tests.patience import PATIENCE_S
from tests.torch.families import WIDE, make_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def broken(error: Exception) -> Callable[..., None]:
    def forward(*_: object) -> None:
        raise error

    return forward


def begin(folder: Path) -> boot_module.Engine:
    """A model that no cache knows."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"told_apart_by": token_hex(8)}))
    return boot(resolve_model(str(folder)), device="cpu", dtype="float32", block_size=16)


@pytest.mark.parametrize("error", [KeyError("lost"), ZeroDivisionError(), IndexError("17")])
def test_an_error_that_nobody_expected_is_a_model_error_with_its_place(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = save_checkpoint("llama", tmp_path / "llama")
    monkeypatch.setattr(LlamaMLP, "forward", broken(error))
    with pytest.raises(ModelError) as told:
        begin(folder)
    assert told.value.exit_code == 3
    line = str(told.value)
    assert "llama cannot be served here" in line
    assert type(error).__name__ in line
    assert str(error) in line
    assert "(test_boot.py:" in line
    assert "in forward)" in line
    assert "\n" not in line
    assert "Traceback" in caplog.text


def test_memory_that_is_short_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint("llama", tmp_path / "llama")
    monkeypatch.setattr(LlamaMLP, "forward", broken(MemoryError()))
    with pytest.raises(OutOfMemory, match="llama does not fit"):
        begin(folder)


@pytest.mark.usefixtures("native")
def test_what_the_compiler_does_not_survive_runs_in_torch_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("baton.engine.cpu.compile.lower", lost)
    folder = save_checkpoint("llama", tmp_path / "llama", seed=3)
    with caplog.at_level(logging.ERROR):
        backend = begin(folder).runner.backend
    assert backend.startswith("in torch, not compiled: the compiler failed with KeyError: 'lost' (")
    assert "Traceback" in caplog.text


def test_a_worker_ends_with_exit_code_3_and_its_reason_in_the_last_line(tmp_path: Path) -> None:
    """Four query heads do not divide among three key heads, which no check of transformers notices."""
    monkey = dict(WIDE, num_key_value_heads=3, head_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules["tests.torch.families"].FAMILIES, "llama", monkey)
        folder = save_checkpoint("llama", tmp_path / "three")
    command = [sys.executable, "-m", "prefill_worker", "--router", f"ipc://{tmp_path}/router"]
    ended = subprocess.run(
        [*command, "--model", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 3
    *before, last = ended.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert "three cannot be served here: " in last
    assert "RuntimeError: " in last
    assert any(line.startswith("Traceback") for line in before)


# ---- memory


def live(tensors: list["weakref.ref[torch.Tensor]"]) -> int:
    return sum(each() is not None for each in tensors)


@pytest.mark.usefixtures("native")
def test_a_compiled_model_leaves_none_of_its_weights_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program has them. They hang in cycles of the traced graph, which are collected late."""
    weights: list[weakref.ref[torch.Tensor]] = []
    load_model = loading.load_model

    def watched(*given: Any) -> Any:
        model = load_model(*given)
        weights.extend(weakref.ref(each) for each in model.parameters())
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    engine = begin(save_checkpoint("llama", tmp_path / "llama", seed=4))
    assert engine.runner.backend == "compiled for this CPU"
    assert len(weights) > 10
    assert live(weights) == 0


def test_a_model_that_runs_in_torch_keeps_no_second_copy_of_packed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears: list[weakref.ref[torch.Tensor]] = []
    load_model = loading.load_model

    def refuse(*_: object) -> None:
        raise CompileError("not today")

    def watched(*given: Any) -> Any:
        model = load_model(*given)
        found = [each for each in model.modules() if type(each) is torch.nn.Linear]
        linears.extend(weakref.ref(each.weight) for each in found)
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    monkeypatch.setattr("baton.engine.cpu.compile.lower", refuse)
    engine = begin(save_checkpoint("qwen3", tmp_path / "qwen3", seed=5))
    assert engine.runner.backend.startswith("in torch")
    packed = sum(type(each).__name__ == "PackedLinear" for each in engine.runner.model.modules())  # type: ignore[attr-defined]
    assert live(linears) == len(linears) - packed


def test_memory_of_cycles_is_given_back() -> None:
    model = make_model("llama")
    model.itself = model  # type: ignore[assignment]
    gone = weakref.ref(model)
    del model
    release_memory()
    assert gone() is None
