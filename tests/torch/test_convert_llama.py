"""LLaMA's own checkpoints: what comes out computes what LLaMA computes; the rest is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from baton.errors import ModelError
from baton.model_files import resolve_model
from baton.models.convert import convert_folder
from baton.models.formats.checkpoint import by_size, write_weights
from baton.text import Tokenizer
from tests.torch.foreign import (
    RANKS,
    cut,
    llama_logits,
    llama_tensors,
    pieces,
    sentencepiece_model,
    tiktoken_list,
    write_llama,
)
from tests.torch.served import check_logits, texts
from tests.torch.test_convert import Canary, equal
from tests.torch.test_native_program import library

OLD = dict(
    n_kv_heads=4, ffn_dim_multiplier=None, leave_out=("rope_theta",), embedding=1
)  # as LLaMA 1 and 2 say it


def json_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def refused(folder: Path, message: str, tokenizer: Path | None = None) -> None:
    out = folder.parent / "new"
    with pytest.raises(ModelError, match=message) as error:
        convert_folder(folder, out, tokenizer)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(folder.parent)) == [folder.name]


@pytest.mark.parametrize(("parts", "embedding"), [(1, 0), (2, 0), (2, 1)])
def test_the_logits_are_llamas_whole_or_in_parts(
    tmp_path: Path, parts: int, embedding: int
) -> None:
    tensors = llama_tensors()
    folder = write_llama(tmp_path / "8B", tensors, parts=parts, embedding=embedding)
    said = convert_folder(folder, tmp_path / "new")
    assert said.startswith(f"21 tensors of {folder} (LLaMA, {parts} file")
    ids = texts(284)
    expected = [llama_logits(tensors, each, theta=500000.0) for each in ids]
    check_logits(tmp_path / "new", expected, ids, library=library() if parts == 2 else None)


def test_llama_2s_tensors_tokens_and_silences_are_understood(tmp_path: Path) -> None:
    old = llama_tensors(rows=len(pieces()), inside=96)
    old |= {  # as many heads for keys as for queries
        f"layers.{layer}.attention.w{each}.weight": torch.randn(32, 32) * 0.2
        for layer in range(2)
        for each in "kv"
    }
    folder = tmp_path / "llama" / "7B"
    vocabulary = sentencepiece_model()
    written = old | {"rope.freqs": torch.ones(4).half()}
    write_llama(folder, written, parts=2, vocabulary=vocabulary, norm_eps=1e-5, **OLD)
    above = folder.parent / "tokenizer.model"
    (folder / "tokenizer.model").rename(above)
    said = convert_folder(folder, tmp_path / "new")
    assert f"\nthe tokenizer was read from {above}" in said
    assert "4,096 tokens are assumed, as in LLaMA 2" in said
    assert "there is no chat template" in said
    files = resolve_model(str(tmp_path / "new"))
    assert (files.eos_token_ids, files.max_positions) == ((2,), 4096)
    ids = texts(len(pieces()))
    expected = [llama_logits(old, each, theta=10000.0) for each in ids]
    check_logits(tmp_path / "new", expected, ids)


@pytest.mark.parametrize(("tied", "factor"), [(False, 8.0), (True, 32.0)])
def test_slowed_rotations_and_shared_embeddings_are_those_of_llama_3_1_and_3_2(
    tmp_path: Path, tied: bool, factor: float
) -> None:
    tensors = llama_tensors(tied=tied)
    folder = write_llama(tmp_path / "1B", tensors, parts=2, use_scaled_rope=True)
    said = convert_folder(folder, tmp_path / "new")
    config = json_of(tmp_path / "new")
    assert config["max_position_embeddings"] == 131072
    assert config["tie_word_embeddings"] is tied
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert ("factor is Meta's for 3.2, 32" in said) is tied
    ids = texts(284)
    expected = [llama_logits(tensors, each, theta=500000.0, factor=factor) for each in ids]
    check_logits(tmp_path / "new", expected, ids)


def test_the_slowing_is_felt() -> None:
    ids = texts(284)[2]
    found = [llama_logits(llama_tensors(), ids, theta=50.0, factor=f) for f in (None, 8.0)]
    assert torch.equal(found[0], found[1])  # all waves are short
    found = [llama_logits(llama_tensors(), ids, theta=500000.0, factor=f) for f in (None, 8.0)]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("params", "context"),
    [
        (dict(rope_theta=500000.0), 8192),
        (dict(rope_theta=500000.0, use_scaled_rope=True), 131072),
        (dict(rope_theta=1000000.0, vocabulary=sentencepiece_model()), 16384),
        (dict(rope_theta=10000.0, vocabulary=sentencepiece_model(), norm_eps=1e-6), 2048),
        (dict(leave_out=["rope_theta"], vocabulary=sentencepiece_model()), 4096),
    ],
)
def test_the_context_is_the_versions_and_a_note_says_so(
    tmp_path: Path, params: dict[str, Any], context: int
) -> None:
    rows = len(pieces()) if "vocabulary" in params else 284
    said = convert_folder(
        write_llama(tmp_path / "x", llama_tensors(rows), **params), tmp_path / "new"
    )
    assert json_of(tmp_path / "new")["max_position_embeddings"] == context
    assert f"{context:,} tokens are assumed" in said


def test_special_tokens_have_metas_names_and_places(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "8B", use_scaled_rope=True)
    convert_folder(folder, tmp_path / "new")
    files = resolve_model(str(tmp_path / "new"))
    base = len(RANKS)
    assert sorted(files.eos_token_ids) == [base + 1, base + 8, base + 9]
    tokenizer = Tokenizer(files.tokenizer_file)
    assert tokenizer.encode("<|eot_id|>the<|reserved_special_token_9|>") == [
        base, base + 9, RANKS[b"the"], base + 17,
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("the").input_ids == [base, RANKS[b"the"]]


def test_large_models_come_out_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.models.formats.checkpoint.FILE_BYTES", 30_000)
    tensors = llama_tensors()
    convert_folder(write_llama(tmp_path / "8B", tensors), tmp_path / "new")
    index = json_of(tmp_path / "new", "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(each.numel() * 4 for each in tensors.values())
    there = {name for name in os.listdir(tmp_path / "new") if name.endswith(".safetensors")}
    assert set(index["weight_map"].values()) == there
    assert len(there) > 2
    whole = tmp_path / "whole"
    monkeypatch.undo()
    convert_folder(tmp_path / "8B", whole)
    found = {
        name: each for file in there for name, each in load_file(tmp_path / "new" / file).items()
    }
    equal(found, load_file(whole / "model.safetensors"))


def test_weights_that_fill_the_last_file_leave_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.models.formats.checkpoint.FILE_BYTES", 8)
    weights = [("a", torch.ones(2)), ("b", torch.ones(2))]
    assert write_weights(by_size(weights), tmp_path) == 2
    assert len(os.listdir(tmp_path)) == 3


def test_a_tokenizer_from_elsewhere_is_taken(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "8B")
    other = tmp_path / "other.model"
    (folder / "tokenizer.model").rename(other)
    convert_folder(folder, tmp_path / "first", other)
    convert_folder(folder, tmp_path / "second", tmp_path / "first" / "tokenizer.json")
    first, second = (json_of(tmp_path / each, "tokenizer.json") for each in ("first", "second"))
    assert first == second


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"quantization_args": {"group_size": 32}}, "has quantization_args, which is not known"),
        ({"moe": {}, "sliding_window": 4096}, "has moe, sliding_window, which is not known"),
        ({"leave_out": ["dim"]}, "lacks dim"),
        ({"leave_out": ["norm_eps"]}, "lacks norm_eps"),
        ({"leave_out": ["rope_theta"]}, "lacks rope_theta"),
        ({"dim": "32"}, "dim must be a number above 0, got '32'"),
        ({"n_heads": True}, "n_heads must be a number above 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number above 0"),
        ({"use_scaled_rope": 1}, "use_scaled_rope must be true or false"),
        ({"n_heads": 5}, "do not divide into each other"),
        ({"n_kv_heads": 3}, "do not divide into each other"),
        ({"n_layers": 10**12}, "does not hold the 1,000,000,000,000 layers"),
        ({"n_layers": 3}, r"lacks layers\.2\.attention\.wk\.weight, .* and 6 more"),
        ({"n_layers": 1}, r"has layers\.1\.attention.*, which params\.json does not account for"),
        ({"n_kv_heads": 4}, r"wk\.weight is \[16, 32\], its .* needs \[32, 32\]"),
        ({"multiple_of": 256}, r"w1\.weight is \[112, 32\], .* needs \[256, 32\]"),
        ({"vocab_size": 32000}, "has 284 rows of tokens, and params.json says 32,000"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    refused(write_llama(tmp_path / "8B", **params), message)


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "13B", parts=2)
    params, first = folder / "params.json", folder / "consolidated.00.pth"
    kept = params.read_bytes(), first.read_bytes()
    params.unlink()
    refused(folder, r"13B does not say the model's shape: params\.json is missing")
    params.write_bytes(b"{'dim': 32}")
    refused(folder, r"params\.json cannot be read")
    params.write_bytes(kept[0])
    first.write_bytes(kept[1][:3000])
    refused(folder, r"consolidated\.00\.pth is not read: it is broken")
    first.unlink()
    refused(folder, r"lacks consolidated\.00\.pth")
    first.write_bytes(kept[1])
    (folder / "tokenizer.model").unlink()
    refused(folder, r"there is no tokenizer\.model in .* with --tokenizer FILE")
    for part in folder.glob("*.pth"):
        part.unlink()
    refused(folder, r"has params\.json, but no consolidated\.00\.pth")


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "13B", parts=2)
    second = folder / "consolidated.01.pth"
    torch.save(llama_tensors(), second)
    refused(folder, r"consolidated\.01\.pth: tok_embeddings\.weight is \[284, 32\], .* \[142, 32\]")


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "13B", parts=2)
    other = llama_tensors()
    other["layers.1.ffn_norm.weight"] += 1
    torch.save(cut(other, 2, embedding=0)[1], folder / "consolidated.01.pth")
    refused(
        folder, r"01\.pth: layers\.1\.ffn_norm\.weight differs from that of consolidated\.00\.pth"
    )


def test_what_files_cannot_share_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "13B", parts=2)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    refused(folder, r"lacks consolidated\.01\.pth")
    for at in (1, 2):
        (folder / f"consolidated.{at:02d}.pth").write_bytes(
            (folder / "consolidated.00.pth").read_bytes()
        )
    refused(folder, r"must be \[32, 32\] by params\.json, which cannot be split over 3 files")


def test_code_in_a_part_is_refused_and_never_run(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "8B")
    torch.save({"w": Canary(tmp_path / "ran")}, folder / "consolidated.00.pth")
    refused(folder, r"consolidated\.00\.pth is not read: .* may be code that runs")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (b"", "is not a SentencePiece model, or is broken"),
        (b"\x00\xff" * 40, "is not a SentencePiece model, or is broken"),
        (b"YQ== 0\nnonsense\n", "line 2: must be a token in base64 and its rank"),
        (b"YQ== 0\nYQ 1\n", "line 2: must be a token in base64 and its rank"),
        (b"YQ== 0\nYQ== 1\n", "line 2: the token occurs twice"),
        (b"YQ== 0\nYg== 2\n", "token ids must run from 0 without a gap"),
        (b"YQ== 0\nYg== 1\n", "has no token for the byte 0x00"),
        (tiktoken_list({token: 2 * rank for token, rank in RANKS.items()}), "without a gap"),
        (tiktoken_list() + b"".join(b"%s %d\n" % (f"AAA{a}".encode(), 266 + i)
                                    for i, a in enumerate("ABCDEFGHIJ")), "no room for the special"),
        (sentencepiece_model([*pieces(), *((f"w{i}", -99.0, 1) for i in range(99))]),
         "has 383 tokens and the model 284: it is another model's"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_does_not_fit_is_refused(
    tmp_path: Path, vocabulary: bytes, message: str
) -> None:
    folder = write_llama(tmp_path / "8B")
    (folder / "tokenizer.model").write_bytes(vocabulary)
    refused(folder, message)


def test_ids_without_text_are_a_note(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "8B", vocabulary=sentencepiece_model(pieces()[:280]))
    said = convert_folder(folder, tmp_path / "new")
    assert "note: 4 of the model's token ids have no text" in said
