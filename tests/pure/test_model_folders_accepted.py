"""Folders that transformers loads are accepted; files, names and permissions that are no model say so;
and what is fetched."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from baton.errors import ModelError
from baton.model_files import DOWNLOADED, NOT_DOWNLOADED, resolve_model
from tests.pure.folders import (
    BROKEN_GGUF,
    CONVERT,
    NOT_READ,
    SAFETENSORS,
    WHOLE,
    Change,
    both,
    config,
    model,
    put,
    renamed,
    without,
)
from tests.pure.test_model_files import LLAMA, safetensors

INDEX = json.dumps({"weight_map": {"w": "shards/model-00001-of-00001.safetensors"}})


def in_a_subfolder(folder: Path) -> None:
    (folder / "shards").mkdir()
    target = folder / "shards" / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors.index.json").write_text(INDEX)


ACCEPTED: dict[str, tuple[Change, dict[str, Any]]] = {
    "no architectures": (without("architectures"), {"architecture": "LlamaForCausalLM"}),
    "null architectures": (config(architectures=None), {"architecture": "LlamaForCausalLM"}),
    "empty architectures": (config(architectures=[]), {"architecture": "LlamaForCausalLM"}),
    "architectures of null": (config(architectures=[None]), {"architecture": "LlamaForCausalLM"}),
    "the bare model": (config(architectures=["LlamaModel"]), {"architecture": "LlamaModel"}),
    "a class of a fork": (config(architectures=["MyLlama"]), {"architecture": "MyLlama"}),
    "a stale index": (
        put(model__safetensors__index__json='{"weight_map": {"w": "gone.safetensors"}}'),
        {},
    ),
    "a broken index": (put(model__safetensors__index__json="{"), {}),
    "shards in a folder": (in_a_subfolder, {}),
    "weights that config.json names": (
        both(
            renamed("model.safetensors", "mine.safetensors"),
            config(transformers_weights="mine.safetensors"),
        ),
        {},
    ),
    "no context": (without("max_position_embeddings"), {"max_positions": 2048}),
    "null context": (config(max_position_embeddings=None), {"max_positions": 2048}),
    "another key": (
        both(config(max_position_embeddings=None, n_positions=77), put()),
        {"max_positions": 77},
    ),
    "the family's own default": (
        config(model_type="qwen2", architectures=None, max_position_embeddings=None),
        {"max_positions": 32768, "architecture": "Qwen2ForCausalLM"},
    ),
    "the tokenizer's limit": (
        both(
            config(model_type="gpt-sw3", max_position_embeddings=None),
            put(tokenizer_config__json='{"model_max_length": 640}'),
        ),
        {"max_positions": 640},
    ),
    "the window": (
        both(
            config(model_type="gpt-sw3", max_position_embeddings=None, sliding_window=96),
            put(tokenizer_config__json='{"model_max_length": 1e30}'),
        ),
        {"max_positions": 96},
    ),
    "nothing about the context": (
        config(model_type="gpt-sw3", max_position_embeddings=None),
        {"max_positions": 2048},
    ),
    "a text_config": (
        put(config__json=json.dumps({"model_type": "llama", "text_config": LLAMA})),
        {"vocab_size": 320, "max_positions": 128, "eos_token_ids": (2,)},
    ),
    "no quantization": (config(quantization_config=None), {}),
    "an end that is no token": (config(eos_token_id=[-1, 2, 2, 999]), {"eos_token_ids": (2,)}),
    "code that transformers has itself": (config(auto_map={"AutoModel": "x.Y"}), {}),
    "a pickle beside": (put(pytorch_model__bin=b"\x80\x02"), {}),
    "GGUF beside": (put(model__gguf=b"GGUF"), {}),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_transformers_loads_is_accepted(what: str, tmp_path: Path) -> None:
    change, expected = ACCEPTED[what]
    folder = model(tmp_path / "model")
    change(folder)
    files = resolve_model(str(folder))
    assert {key: getattr(files, key) for key in expected} == expected
    assert [path.read_bytes() for path in files.weights] == [WHOLE]


def test_integers_that_are_no_weights_are_not_taken_for_quantized_ones(tmp_path: Path) -> None:
    mask = safetensors([1.0], name="transformer.h.0.attn.bias", dtype="U8")
    put(model__safetensors=mask)(model(tmp_path / "model"))
    assert resolve_model(str(tmp_path / "model")).weights


# ---- a file instead of a folder


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("m.gguf", b"GGUF", f"{{file}} {BROKEN_GGUF}"),
        ("m", b"GGUF\x03", f"{{file}} {BROKEN_GGUF}"),
        ("m.bin", b"PK\x03\x04", f"{{file}} is a pickle, which is never loaded: {CONVERT}"),
        ("m.pt", b"", f"{{file}} is a pickle, which is never loaded: {CONVERT}"),
        ("m", b"\x80\x02}q", f"{{file}} is a pickle, which is never loaded: {CONVERT}"),
        ("m.onnx", b"\x08", f"{{file}} is ONNX, which is not read: {SAFETENSORS}"),
        ("m.npz", b"PK\x03\x04", f"{{file}} is NumPy, which is not read: {SAFETENSORS}"),
        ("m.nemo", b"PK\x03\x04", f"{{file}} is NeMo, which is not read: {SAFETENSORS}"),
        ("ggml.bin", b"lmgg", "{file} is a GGML file, older than GGUF, which is not read: use the same "
                              "model in GGUF or safetensors"),
        ("m.zip", b"PK\x03\x04", "{file} is a zip archive: unpack it, and use the folder with its "
                                 "config.json"),
        ("model.safetensors", WHOLE, "{file} is a safetensors file: use its folder, {folder}"),
        ("m.txt", b"hello", "{file} is a file, and a model is a folder with config.json, "
                            "model.safetensors and tokenizer.json"),
    ],
)  # fmt: skip
def test_a_file_is_told_what_it_is(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder / name))
    said = line.replace("{file}", str(folder / name)).replace("{folder}", str(folder))
    assert str(caught.value) == said
    listed = tmp_path / "paths.yaml"
    listed.write_text(f"mine: {folder / name}")
    with pytest.raises(ModelError) as again:
        resolve_model("mine", paths_file=listed)
    assert str(again.value) == said


def test_a_pickle_without_a_config_is_not_sent_to_convert(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="convert its folder, which needs a config"):
        resolve_model(str(tmp_path / "m.bin"))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_a_name_that_can_be_no_path_is_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_an_advised_command_can_be_typed_whatever_the_folder_is_called(tmp_path: Path) -> None:
    folder = model(tmp_path / "my model's")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    typed = str(caught.value).partition("convert ")[2].partition(" OUT")[0]
    assert typed == f"""'{tmp_path}/my model'"'"'s'"""


# ---- permissions


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so it becomes another user meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config.json", f"{NOT_READ} Permission denied"),
        ("model.safetensors", "{folder}/model.safetensors cannot be read: Permission denied"),
        ("tokenizer.json", "{folder}/tokenizer.json cannot be read: Permission denied"),
        (".", "{folder} cannot be read: Permission denied"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, line: str) -> None:
    with TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = model(Path(place).resolve() / "model")
        os.chmod(folder, 0o755)
        os.chmod(folder / name, 0)
        try:
            with as_nobody(), pytest.raises(ModelError) as caught:
                resolve_model(str(folder))
        finally:
            os.chmod(folder / name, 0o755)
    assert str(caught.value) == line.replace("{folder}", str(folder))


# ---- what is fetched


def test_all_that_serving_reads_is_fetched_and_not_the_same_weights_twice() -> None:
    wanted = [
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/tool_use.jinja", "shards/model-00001-of-00001.safetensors",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "README.md",
        "consolidated.safetensors", "onnx/config.json", "onnx/model.onnx", "model.fp16.safetensors",
        "modeling_mine.py", "model.gguf", "tf_model.h5", ".gitattributes",
    ]  # fmt: skip
    fetched = filter_repo_objects(
        [*wanted, *left], allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)
    )
    assert list(fetched) == wanted
