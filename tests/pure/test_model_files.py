"""Model names: each way to be wrong has its line, and none of them waits for torch."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton import model_files
from baton.errors import ModelError
from baton.model_files import ModelFiles, resolve_model
from baton.package import ROOT
from tests.patience import PATIENCE_S

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def safetensors(numbers: list[float], name: str = "w", dtype: str = "F32") -> bytes:
    """A file of one tensor, whose bytes are those of fp32."""
    data = struct.pack(f"<{len(numbers)}f", *numbers)
    entry = {"dtype": dtype, "shape": [len(numbers)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model; the tests break it."""
    path = tmp_path / "model"
    path.mkdir()
    write_config(path)
    (path / "model.safetensors").write_bytes(safetensors([1.0, 2.0]))
    (path / "tokenizer.json").write_text("{}")
    return path


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))


def resolve(name: str | Path, tmp_path: Path, entries: str = "") -> ModelFiles:
    paths_file = tmp_path / "model_paths.yaml"
    paths_file.write_text(entries)
    return resolve_model(str(name), paths_file=paths_file)


def refusal(name: str | Path, tmp_path: Path, entries: str = "") -> str:
    with pytest.raises(ModelError) as caught:
        resolve(name, tmp_path, entries)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_is_a_model(folder: Path, tmp_path: Path) -> None:
    files = resolve(folder, tmp_path)
    assert files.folder == folder
    assert files.shape is None
    assert (files.architecture, files.model_type) == ("LlamaForCausalLM", "llama")
    assert (files.vocab_size, files.max_positions, files.eos_token_ids) == (320, 128, (2,))


def test_a_name_stands_for_its_folder(folder: Path, tmp_path: Path) -> None:
    assert resolve("mine", tmp_path, f"mine: {folder}").folder == folder


def test_the_home_folder_is_known_by_its_sign(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("mine", tmp_path, "mine: ~/model").folder == folder


def test_generation_config_decides_what_ends_a_text(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert resolve(folder, tmp_path).eos_token_ids == (5, 7)


def test_no_end_token_is_no_mistake(folder: Path, tmp_path: Path) -> None:
    write_config(folder, eos_token_id=None)
    assert resolve(folder, tmp_path).eos_token_ids == ()


def test_equal_folders_have_equal_fingerprints(folder: Path, tmp_path: Path) -> None:
    before = resolve(folder, tmp_path).fingerprint
    renamed = folder.rename(tmp_path / "elsewhere")
    assert resolve(renamed, tmp_path).fingerprint == before
    (renamed / "model.safetensors").write_bytes(safetensors([1.0, 3.0]))
    assert resolve(renamed, tmp_path).fingerprint != before


@pytest.mark.parametrize("shape", ["gpt2", "qwen2-0.5b", "qwen2-7b"])
def test_shapes_need_no_weights(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(model_files, "BUNDLED", {"demo": tmp_path})
    files = resolve(f"random:{shape}", tmp_path)
    assert (files.folder, files.shape) == (None, shape)
    assert files.vocab_size > 50_000


def test_an_unknown_shape_is_told_the_known_ones(tmp_path: Path) -> None:
    assert "random:qwen2-7b" in refusal("random:gpt5", tmp_path)


def test_an_unknown_name_is_told_where_we_looked_and_what_is_near(tmp_path: Path) -> None:
    message = refusal("qwen-0.5b", tmp_path, "demo: baton/models/demo")
    assert "'qwen-0.5b'" in message
    assert "model_paths.yaml" in message
    assert "did you mean random:qwen2-0.5b?" in message
    assert "known names: demo, random:gpt2" in message


def test_a_hub_id_that_is_not_here_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "Hugging Face cache" in refusal("nobody/nothing", tmp_path)


def test_an_entry_that_leads_nowhere(tmp_path: Path) -> None:
    assert "no such folder" in refusal("mine", tmp_path, f"mine: {tmp_path / 'gone'}")


@pytest.mark.parametrize("entries", ["- a\n- b", "mine: [1]", "mine: {", "mine: 3"])
def test_a_paths_file_of_another_form(entries: str, tmp_path: Path) -> None:
    assert "model_paths.yaml" in refusal("mine", tmp_path, entries)


def test_a_folder_without_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", ""])
def test_an_unreadable_config(text: str, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "but an encoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "decoder-only"),
        ({"is_encoder_decoder": True}, "decoder-only"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "BloomForCausalLM"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "running state"),
        ({"architectures": ["DiffLlamaForCausalLM"], "model_type": "diffllama"}, "another kind"),
        ({"auto_map": {"AutoModel": "x.Y"}, "model_type": "homemade"}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_a_model_we_do_not_serve(
    changes: dict[str, Any], why: str, folder: Path, tmp_path: Path
) -> None:
    write_config(folder, **changes)
    assert why in refusal(folder, tmp_path)


def test_code_that_transformers_has_itself_is_not_needed(folder: Path, tmp_path: Path) -> None:
    write_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert resolve(folder, tmp_path).model_type == "llama"


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_to_be_converted(file: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / file)
    message = refusal(folder, tmp_path)
    assert file in message
    assert f"python main.py convert {folder} OUT" in message


def test_no_weights_at_all(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder, tmp_path)


def test_shards_are_read_in_their_order_and_all_of_them(folder: Path, tmp_path: Path) -> None:
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    assert "lacks model-2.safetensors" in refusal(folder, tmp_path)
    (folder / "model-2.safetensors").write_bytes(safetensors([0.5], "b"))
    assert resolve(folder, tmp_path).fingerprint


@pytest.mark.parametrize(
    "index",
    ["{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "/x"}}'],
)
def test_an_index_of_another_form(index: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder, tmp_path)


def test_a_truncated_file(folder: Path, tmp_path: Path) -> None:
    whole = safetensors([1.0, 2.0])
    (folder / "model.safetensors").write_bytes(whole[:-1])
    message = refusal(folder, tmp_path)
    assert f"is {len(whole) - 1} bytes, its header says {len(whole)}" in message


@pytest.mark.parametrize(
    "content",
    [b"\x01", b"\xff" * 8 + b"{}", b"\x02" + bytes(7) + b"[]", safetensors([1.0])[:20]],
)
def test_a_file_that_is_no_safetensors(content: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors is broken" in refusal(folder, tmp_path)


def test_a_pointer_instead_of_weights(folder: Path, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (folder / "model.safetensors").write_bytes(pointer)
    assert "fetch it again" in refusal(folder, tmp_path)


def test_none_of_this_imports_torch() -> None:
    code = (
        "import sys; from baton.model_files import resolve_model\n"
        "try: resolve_model('nobody')\n"
        "except Exception as error: assert 'known names' in str(error), error\n"
        "else: raise SystemExit('found')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=PATIENCE_S)
