"""GGUF files that are broken, hostile or of another kind: one clear line each, little memory and time."""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ModelError
from baton.gguf.folder import contents, gguf_file
from baton.gguf.header import MOST_ITEMS
from baton.model_files import resolve_model
from tests.pure.gguf_bytes import (
    INSIDE,
    LETTERS,
    ROWS,
    SHAPES,
    VALUES,
    WIDTH,
    gguf,
    packed,
    text,
    write,
)

HUGE = (1 << 63) + 5


def test_a_file_is_a_model_by_its_path_and_by_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", gguf())
    files = resolve_model(str(path))
    assert (files.gguf, files.max_positions, files.vocab_size) == (path, 64, ROWS)
    assert (files.architecture, files.eos_token_ids) == ("LlamaForCausalLM", (0,))
    assert resolve_model(str(tmp_path)).fingerprint == files.fingerprint
    other = write(tmp_path / "other.bin", gguf({"general.name": "another"}))
    assert resolve_model(str(other)).fingerprint != files.fingerprint


def test_a_folder_of_several_models_names_them(tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj-a.gguf"):
        write(tmp_path / name, gguf())
    with pytest.raises(ModelError, match=r"several models: a-Q4_0.gguf, a-Q8_0.gguf; name one"):
        gguf_file(tmp_path)
    (tmp_path / "a-Q8_0.gguf").unlink()
    assert gguf_file(tmp_path) == tmp_path / "a-Q4_0.gguf"
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None


def shape(name: str, *sizes: int) -> dict[str, tuple[int, ...]]:
    return SHAPES | {name: sizes}


def without(name: str) -> dict[str, tuple[int, ...]]:
    return {each: sizes for each, sizes in SHAPES.items() if each != name}


EMPTY_LIST = struct.pack("<IIQ", 9, 8, 0)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "another magic": (b"GGML" + gguf()[4:], "does not begin with GGUF"),
    "the magic alone": (b"GGUF", "ends in the middle of its header"),
    "version 1": (gguf(version=1), "version 1, only 2 and 3 are read"),
    "version 4": (gguf(version=4), "version 4"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "many tensors": (gguf(counts=(HUGE, 3)), "claims 9,223,372,036,854,775,813 tensors"),
    "many values": (gguf(counts=(3, HUGE)), "and 9,223,372,036,854,775,813 values"),
    "more tensors than there are": (gguf(counts=(1 << 18, len(VALUES))), "broken GGUF file"),
    "a text that is longer than the file": (
        gguf({"general.name": struct.pack("<IQ", 8, 1 << 20)}), "ends in the middle"),
    "a huge text": (gguf({"general.name": struct.pack("<IQ", 8, HUGE)}), "claims 9,223"),
    "a text that is none": (gguf({"general.name": struct.pack("<IQ", 8, 1) + b"\xff"}), "not UTF-8"),
    "a list of many": (gguf({"x": struct.pack("<IIQ", 9, 4, HUGE)}), "x claims 9,223"),
    "a list longer than the file": (gguf({"x": struct.pack("<IIQ", 9, 10, MOST_ITEMS >> 1)}), "ends in"),
    "a list of lists": (gguf({"x": struct.pack("<IIQ", 9, 9, 1)}), "unknown type 9"),
    "a value of no type": (gguf({"x": struct.pack("<I", 99)}), "x has a value of the unknown type 99"),
    "a key twice": (gguf({"x": packed(1) + text("y") + packed(1), "y": 2},
                         counts=(len(SHAPES), len(VALUES) + 3)), "y twice"),
    "no power of 2": (gguf({"general.alignment": 48}), "general.alignment is 48"),
    "no dimension": (gguf(shapes=shape("output_norm.weight")), "0 dimensions"),
    "many dimensions": (gguf(shapes=shape("output_norm.weight", *[1] * 9)), "9 dimensions"),
    "a dimension of 0": (gguf(shapes=shape("output_norm.weight", 0)), r"F32 and has the shape \[0\]"),
    "huge dimensions": (gguf(shapes={"x": (1 << 40, 1 << 40)}), "x needs bytes up to"),
    "blocks that do not fill a row": (gguf(shapes={"x": (4, 33)}, kind=8), r"Q8_0 and has the shape"),
    "an offset outside": (gguf(offsets={"output_norm.weight": 1 << 50}), "norm.weight needs bytes"),
    "a tensor in another": (gguf(offsets={"output_norm.weight": 32}), "lies in another tensor"),
    "a type that is not read": (gguf(kind=10), "Q2_K .* is not read: use a file in F32, F16, Q4_0"),
    "no known type": (gguf(kind=77), "the unknown type 77"),
    "no architecture": (gguf({"general.architecture": None}), "names no architecture"),
    "another architecture": (gguf({"general.architecture": "mamba"}), "'mamba', a language model which"),
    "an unknown one": (gguf({"general.architecture": "x"}), "architecture 'x', and is not read: llama, "),
    "an image encoder": (gguf({"general.architecture": "clip"}), "'clip', a model's part for images or"),
    "an adapter": (gguf({"general.type": "adapter"}), "type is 'adapter', a LoRA adapter, to be merged"),
    "a projector": (gguf({"general.type": "mmproj"}), "'mmproj', .*; use the file with the model"),
    "no layers": (gguf({"llama.block_count": 0}), "llama.block_count 0: a count is needed"),
    "more layers than tensors": (gguf({"llama.block_count": 1 << 20}), "not hold the 1,048,576 layers"),
    "a size that is a text": (gguf({"llama.context_length": "x"}), "llama.context_length x"),
    "an epsilon that is none": (
        gguf({"llama.attention.layer_norm_rms_epsilon": float("nan")}), "nan: a number is needed"),
    "experts": (gguf({"llama.expert_count": 8}), "llama.expert_count 8: such a model is not read"),
    "a window": (gguf({"llama.attention.sliding_window": 8}), "llama.attention.sliding_window"),
    "a value that is not known": (gguf({"llama.new_thing": 1}), "llama.new_thing, which is not known"),
    "a part of the head that rotates": (
        gguf({"llama.rope.dimension_count": 8}), "rope.dimension_count 8 and heads of 16"),
    "a rope that is not read": (gguf({"llama.rope.scaling.type": "longrope"}), "'longrope', which"),
    "heads that do not divide": (gguf({"llama.attention.head_count": 3}), "3 heads, which do not divide"),
    "a tensor too few": (gguf(shapes=without("blk.0.ffn_up.weight")), "lacks blk.0.ffn_up.weight"),
    "a tensor too many": (gguf(shapes=shape("blk.0.extra.weight", 8)), "holds blk.0.extra.weight, which"),
    "a tensor of another shape": (
        gguf(shapes=shape("blk.0.ffn_up.weight", WIDTH, INSIDE)), r"shape \[32, 64\], its sizes need"),
    "tokens without embeddings": (
        gguf(shapes=shape("token_embd.weight", 8, WIDTH)), "96 tokens and embeddings for 8"),
    "no tokens": (gguf({"tokenizer.ggml.tokens": None, "tokenizer.ggml.eos_token_id": None}),
                  "no list tokenizer.ggml.tokens"),
    "an empty list of tokens": (gguf({"tokenizer.ggml.tokens": EMPTY_LIST,
                                      "tokenizer.ggml.eos_token_id": None}), "no tokens"),
    "a token twice": (gguf({"tokenizer.ggml.tokens": ["<|end|>", *LETTERS, "a"]}), "token 'a' twice"),
    "a very long token": (gguf({"tokenizer.ggml.tokens": ["<|end|>", *LETTERS, "a" * 5000]}), "4096"),
    "another tokenizer": (gguf({"tokenizer.ggml.model": "t5"}), "'t5': gpt2 and llama are read"),
    "another way to split": (gguf({"tokenizer.ggml.pre": "new"}), "tokenizer.ggml.pre 'new'"),
    "types of other tokens": (gguf({"tokenizer.ggml.token_type": [1, 2]}), "one for each of 96 tokens"),
    "a merge of no tokens": (gguf({"tokenizer.ggml.merges": ["a c"]}), "the merge 'a c'"),
    "a merge of one": (gguf({"tokenizer.ggml.merges": ["a"]}), "the merge 'a'"),
    "no scores": (gguf({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}),
                  "no list tokenizer.ggml.scores"),
    "an end outside": (gguf({"tokenizer.ggml.eos_token_id": 4000}), "eos_token_id 4000 of 96 tokens"),
    "a template that is none": (gguf({"tokenizer.chat_template.x": 3}), "template 'x' is not a text"),
    "a part of several": (gguf({"split.count": 3}), "one of 3 parts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    made, why = REFUSED[name]
    path = write(tmp_path / "model.gguf", made)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=why) as error:
            resolve_model(str(path))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def judged(path: Path) -> None:
    """Read, or refused in one line."""
    try:
        json.dumps(contents(path))
    except ModelError as refusal:
        said = str(refusal)
    else:
        return
    assert "\n" not in said


GOOD = gguf()
WHOLE_HEADER = GOOD.index(b"blk.0.ffn_down.weight") + 60


@given(
    st.lists(st.tuples(st.integers(0, WHOLE_HEADER), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_any_bytes_of_the_header_may_be_wrong(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    made = bytearray(GOOD)
    for place, byte in changes:
        made[place] = byte
    judged(write(tmp_path_factory.mktemp("fuzz") / "model.gguf", bytes(made)))


@given(st.integers(0, len(GOOD) - 1))
def test_a_file_may_end_anywhere(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "model.gguf", GOOD[:length])
    with pytest.raises(ModelError):
        contents(path)


SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**31), 2**32 - 1), st.floats(width=32), st.text(max_size=8),
    st.lists(st.integers(-5, 5), max_size=4), st.lists(st.text(max_size=3), min_size=1, max_size=3),
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(sorted(VALUES)), st.none() | SCALARS, min_size=1, max_size=3)
)
def test_any_value_may_be_of_any_kind(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    judged(write(tmp_path_factory.mktemp("values") / "model.gguf", gguf(values)))
