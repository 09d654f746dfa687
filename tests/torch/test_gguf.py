"""GGUF models: the weights and the tokens are those of transformers' own reading of the same file."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import dequantize
from transformers import PreTrainedModel
from transformers.integrations.gguf import dequant

from baton import LLM, SamplingParams
from baton.engine.loading import load_model
from baton.errors import ModelError
from baton.gguf.config import llama3_divisors
from baton.gguf.header import OTHER_TYPES, SIZES, read_header
from baton.gguf.weights import gguf_weights
from baton.model_files import resolve_model
from baton.models.convert import convert_folder
from tests.torch.gguf_files import (
    MIXED,
    SHAPES,
    UNREAD_BY_TRANSFORMERS,
    Kind,
    Written,
    transformers_reading,
    write_gguf,
)
from tests.torch.served import check_logits, texts

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)
KINDS = [Kind(number) for number in SIZES]


def ours(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve_model(str(path)), CPU, dtype)


def same_weights(mine: PreTrainedModel, theirs: PreTrainedModel) -> None:
    right = theirs.state_dict()
    assert mine.state_dict().keys() == right.keys()
    for name, weight in mine.state_dict().items():
        assert torch.equal(weight, right[name]), name


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    prompt = torch.tensor([ids])
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(each) for each in found[0][len(ids) :]]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("gguf").setLevel(logging.ERROR)


@pytest.mark.parametrize("arch", SHAPES)
def test_weights_and_logits_are_those_of_the_model_and_of_transformers_reading(
    tmp_path: Path, arch: str
) -> None:
    path = tmp_path / "model.gguf"
    original = write_gguf(path, arch)
    if arch not in UNREAD_BY_TRANSFORMERS:
        same_weights(ours(path), transformers_reading(path))
    convert_folder(path, tmp_path / "plain")
    ids = texts(320)
    with torch.inference_mode():
        right = [original(torch.tensor([each])).logits[0] for each in ids]
    check_logits(tmp_path / "plain", right, ids)


K_KINDS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


@pytest.mark.parametrize(
    ("arch", "kinds", "settings"),
    [
        ("llama", MIXED, {}),
        ("gemma3", MIXED, {}),
        ("qwen2", K_KINDS, dict(hidden_size=256, intermediate_size=512)),
    ],
)
def test_greedy_tokens_of_quantized_weights_are_those_of_transformers_reading(
    tmp_path: Path, arch: str, kinds: tuple[Kind, ...], settings: dict[str, Any]
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, arch, Written(kinds=kinds, settings=settings))
    reading = transformers_reading(path)
    same_weights(ours(path), reading)
    prompts = texts(320)
    with LLM(str(path), dtype="float32") as llm:
        answers = llm.generate(prompts, GREEDY, max_new_tokens=40, ignore_eos=True)
    for ids, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == greedy(reading, ids, 40)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_read_as_both_references_read_it(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "model.gguf"
    wide = dict(hidden_size=256, intermediate_size=256)
    original = write_gguf(path, "qwen2", Written(kinds=(kind,), settings=wide))
    tensor = read_header(path).tensors["blk.1.ffn_up.weight"]
    assert SIZES[tensor.kind][0] == kind.name
    raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
    found = dict(gguf_weights(path))["model.layers.1.mlp.up_proj.weight"].float()
    rows = raw.reshape(tensor.shape[0], -1)
    assert np.array_equal(found.numpy(), dequantize(rows, kind).reshape(tensor.shape))
    if int(kind) in dequant.GGML_BLOCK:
        second = dequant.dequantize(torch.from_numpy(raw), int(kind)).view(tensor.shape)
        torch.testing.assert_close(found, second, rtol=1e-6, atol=1e-7)
    if kind not in K_KINDS:  # whose blocks are random
        right = original.state_dict()["model.layers.1.mlp.up_proj.weight"]
        torch.testing.assert_close(found, right, rtol=0, atol=0.06)


def test_the_table_of_types_is_the_packages() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for number, (name, weights, size) in SIZES.items():
        assert (Kind(number).name, GGML_QUANT_SIZES[Kind(number)]) == (name, (weights, size))
    for number, name in OTHER_TYPES.items():
        assert Kind(number).name == name


def divisors(theta: float, factor: float, head: int) -> np.ndarray[Any, Any]:
    return np.array(llama3_divisors(theta, head // 2, factor), dtype=np.float32)


ROPES: dict[str, tuple[str, Written]] = {
    "llama3": (
        "llama",
        Written(
            settings=dict(
                rope_parameters=dict(
                    rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0,
                    high_freq_factor=4.0, original_max_position_embeddings=8192,
                )
            ),
            tensors={"rope_freqs.weight": divisors(500000.0, 32.0, 16)},
        ),
    ),
    "linear": (
        "qwen3",
        Written(
            settings=dict(rope_parameters=dict(rope_type="linear", rope_theta=1e5, factor=4.0)),
            values={"qwen3.rope.scaling.type": "linear", "qwen3.rope.scaling.factor": 4.0},
        ),
    ),
    "yarn": (
        "qwen2",
        Written(
            settings=dict(
                rope_parameters=dict(
                    rope_type="yarn", rope_theta=1e5, factor=4.0, original_max_position_embeddings=32
                )
            ),
            values={
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 32,
            },
        ),
    ),
    "linear in gemma3's far layers": (
        "gemma3",
        Written(
            settings=dict(
                rope_parameters=dict(
                    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
                )
            ),
            values={"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
        ),
    ),
    "a head that is not the width divided": ("qwen3", Written(settings=dict(head_dim=24))),
    "biases": ("llama", Written(settings=dict(attention_bias=True))),
    "an output of its own": ("gemma2", Written(settings=dict(tie_word_embeddings=False))),
    "tied": ("llama", Written(settings=dict(tie_word_embeddings=True))),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_what_transformers_reading_leaves_out_is_that_of_the_original(
    tmp_path: Path, name: str
) -> None:
    """transformers reads no rope scaling, no biases of llama, and no length of qwen3's heads."""
    arch, how = ROPES[name]
    path = tmp_path / "model.gguf"
    original = write_gguf(path, arch, how)
    convert_folder(path, tmp_path / "plain")
    ids = texts(320)
    with torch.inference_mode():
        right = [original(torch.tensor([each])).logits[0] for each in ids]
    check_logits(tmp_path / "plain", right, ids)


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_their_scores_by_width_over_heads(
    tmp_path: Path, arch: str, layers: int
) -> None:
    """No file says so; llama.cpp knows these models by their number of layers."""
    path = tmp_path / "model.gguf"
    for count, scale in ((layers, 16), (1, 256)):
        write_gguf(path, arch, Written(settings=dict(num_hidden_layers=count, layer_types=None)))
        assert resolve_model(str(path)).config["query_pre_attn_scalar"] == scale


def test_smaller_dtypes_are_rounded_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma2", Written(kinds=(Kind.Q8_0,)))
    exact = ours(path)
    half = ours(path, torch.bfloat16)
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name


def test_a_model_in_parts_is_whole(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, "llama")
    parts = split(whole, tmp_path / "parts", 3)
    mine, theirs = ours(parts[0]), ours(whole)
    same_weights(mine, theirs)
    same_weights(ours(tmp_path / "parts"), theirs)
    with pytest.raises(ModelError, match="is one of 3 parts: name the first one"):
        resolve_model(str(parts[1]))
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"is incomplete: .*-00002-of-00003.gguf is missing"):
        resolve_model(str(parts[0]))


def split(path: Path, folder: Path, count: int) -> list[Path]:
    """As llama.cpp splits a file: all values in the first part, tensors in each."""
    from gguf import GGUFReader, GGUFWriter

    from tests.torch.gguf_files import add_value

    folder.mkdir()
    reader = GGUFReader(path)
    names = [folder / f"model-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    for number, name in enumerate(names):
        writer = GGUFWriter(name, "llama")
        if not number:
            for key, value in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    add_value(writer, key, value.contents())
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names
