"""What is wrong without the weights is told before they are read, which may take minutes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.cluster.launch import WorkerOptions
from baton.errors import InputError, ModelError
from decode_worker import process
from tests.torch.families import save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose weights are refused when they are read."""
    folder = save_checkpoint("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def run(folder: Path, **settings: Any) -> None:
    options = WorkerOptions(
        router="tcp://127.0.0.1:1", model=str(folder), device="cpu", dtype="float32", name="d",
        threads=None, block_size=16, max_model_len=None, max_num_batched_tokens=64, drain_timeout=1.0,
        keys=None, parent=None,
    )  # fmt: skip
    given: dict[str, Any] = dict(
        beside=(0, 0), kv_transport="auto", max_num_seqs=1, kv_cache_memory_bytes=None, run_dir=None,
        kv_host=None,
        prefix_caching=True, speculative_model=None, num_speculative_tokens=4,
    )  # fmt: skip
    process.run(options, **given | settings)


def test_the_weights_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="holds NaN"):
        run(folder)


def test_a_tokenizer_that_cannot_be_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 7}}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        run(folder)


def test_a_draft_model_of_another_vocabulary(folder: Path) -> None:
    with pytest.raises(InputError, match="must share the vocabulary"):
        run(folder, speculative_model="demo")


def test_a_transport_without_a_socket(folder: Path) -> None:
    with pytest.raises(InputError, match="needs a socket"):
        run(folder, kv_transport="frames")
