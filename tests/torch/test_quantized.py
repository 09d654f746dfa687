"""Quantized checkpoints: the weights are those of the format's definition, the tokens transformers' on
them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from baton import LLM, SamplingParams
from baton.engine.loading import load_model
from baton.errors import ModelError
from baton.model_files import resolve_model
from baton.quantized.plan import INDEX
from baton.quantized.weights import _index, full_weights
from tests.torch.quantized_files import (
    Encode,
    Format,
    awq,
    fp8,
    gptq,
    in_full_width,
    packed,
    rounded,
    saved,
    signed,
    write_quantized,
)
from tests.torch.served import texts
from tests.torch.test_gguf import greedy

CPU = torch.device("cpu")
Full = dict[str, torch.Tensor]
GREEDY = SamplingParams(temperature=0)


def gptq_format(
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    kind: str | None = None,
) -> Format:
    """`kind`: checkpoint_format, if it is told."""

    def encode(_: str, weight: torch.Tensor) -> Any:
        matrix = rounded(weight, bits, group, symmetric=symmetric, shuffled=act_order)
        return gptq(matrix, bits, less_one=kind != "gptq_v2"), matrix.full()

    settings: dict[str, Any] = dict(quant_method="gptq", bits=bits, group_size=group, sym=symmetric)
    settings |= dict(desc_act=act_order) | ({"checkpoint_format": kind} if kind else {})
    return Format(settings, encode)


def awq_format(group: int) -> Format:
    def encode(_: str, weight: torch.Tensor) -> Any:
        matrix = rounded(weight, 4, group)
        return awq(matrix), matrix.full()

    about = dict(quant_method="awq", bits=4, group_size=group, version="gemm", zero_point=True)
    return Format(about, encode)


def compressed(encode: Encode, weights: dict[str, Any], kind: str, **more: Any) -> Format:
    """compressed-tensors with one group for all Linear modules."""
    about = dict(
        quant_method="compressed-tensors", format=kind, ignore=["lm_head"],
        quantization_status="compressed",
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights} | more},
    )  # fmt: skip
    return Format(about, encode)


def packed_format(bits: int, group: int, *, symmetric: bool = True, order: bool = False) -> Format:
    def encode(_: str, weight: torch.Tensor) -> Any:
        matrix = rounded(weight, bits, group, symmetric=symmetric, shuffled=order)
        return packed(matrix, bits, symmetric=symmetric, with_index=order), matrix.full()

    strategy = (
        {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    )
    weights = dict(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    return compressed(encode, weights, "pack-quantized")


def int8_format(*, symmetric: bool, dynamic: bool) -> Format:
    def encode(_: str, weight: torch.Tensor) -> Any:
        matrix = rounded(weight, 8, -1, symmetric=symmetric)
        return signed(matrix, symmetric=symmetric), matrix.full()

    inputs = dict(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True)
    weights = dict(num_bits=8, type="int", strategy="channel", symmetric=symmetric)
    return compressed(
        encode, weights, "int-quantized", input_activations=inputs if dynamic else None
    )


def fp8_parts(
    weight: torch.Tensor, rows: int | None, columns: int | None, scale: str, flat: bool = False
) -> Any:
    parts, whole = fp8(weight, rows, columns)
    factors = parts.pop("factors")
    return parts | {scale: factors.flatten() if flat else factors}, whole


def fp8_compressed(strategy: str) -> Format:
    sizes: dict[str, tuple[int | None, int | None]] = {
        "tensor": (None, None), "channel": (1, None), "block": (16, 32),
    }  # fmt: skip

    def encode(_: str, weight: torch.Tensor) -> Any:
        flat = strategy == "tensor"
        parts, whole = fp8_parts(weight, *sizes[strategy], "weight_scale", flat)
        return parts | {"input_scale": torch.tensor([0.5])}, whole

    weights: dict[str, Any] = dict(num_bits=8, type="float", strategy=strategy, symmetric=True)
    if strategy == "block":
        weights["block_structure"] = [16, 32]
    static = dict(num_bits=8, type="float", strategy="tensor", dynamic=False)
    return compressed(encode, weights, "float-quantized", input_activations=static)


def fp8_blocks(size: tuple[int, int] | None, told: bool = True) -> Format:
    rows, columns = size or (None, None)
    about: dict[str, Any] = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3")
    if told:
        about["weight_block_size"] = size
    return Format(about, lambda _, weight: fp8_parts(weight, rows, columns, "weight_scale_inv"))


FORMATS: dict[str, Format] = {
    "gptq 4 bits": gptq_format(4, 32),
    "gptq 8 bits, one group": gptq_format(8, -1),
    "gptq 4 bits, act-order": gptq_format(4, 16, act_order=True),
    "gptq 4 bits, zero points": gptq_format(4, 16, symmetric=False),
    "gptq 8 bits, zero points, act-order": gptq_format(8, 32, symmetric=False, act_order=True),
    "gptq 2 bits, zero points, v1 told": gptq_format(2, 16, symmetric=False, kind="gptq"),
    "gptq 4 bits, zero points, v2": gptq_format(4, 16, symmetric=False, kind="gptq_v2"),
    "awq": awq_format(32),
    "awq, one group": awq_format(-1),
    "packed 4 bits": packed_format(4, 32),
    "packed 4 bits, one group": packed_format(4, -1),
    "packed 4 bits, zero points": packed_format(4, 16, symmetric=False),
    "packed 4 bits, act-order": packed_format(4, 16, order=True),
    "packed 8 bits": packed_format(8, 32),
    "packed 8 bits, zero points": packed_format(8, -1, symmetric=False),
    "int8": int8_format(symmetric=True, dynamic=False),
    "int8, zero points": int8_format(symmetric=False, dynamic=False),
    "int8, dynamic": int8_format(symmetric=True, dynamic=True),
    "fp8 for all": fp8_compressed("tensor"),
    "fp8 rows": fp8_compressed("channel"),
    "fp8 blocks": fp8_compressed("block"),
    "fp8 128": fp8_blocks((128, 128)),
    "fp8 small blocks": fp8_blocks((32, 48)),
    "fp8 128, untold": fp8_blocks((128, 128), told=False),
    "fp8 one factor": fp8_blocks(None),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("source") / "llama")


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve_model(str(folder)), CPU, dtype)


def restored(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights as loading gives them to transformers."""
    plan = resolve_model(str(folder)).quantized
    assert plan is not None
    return dict(full_weights(plan, dtype))


def check_same(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, weight in found.items():
        assert torch.equal(weight, right[name].to(weight.dtype)), name


@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_those_of_the_formats_definition(
    tmp_path: Path, llama: Path, name: str
) -> None:
    full = write_quantized(tmp_path / "model", llama, FORMATS[name])
    assert len(full) == 21  # 14 of them are quantized
    check_same(restored(tmp_path / "model"), full)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("gpt2", gptq_format(4, 32)),  # keeps its matrices transposed
        ("phi3", awq_format(16)),  # one matrix for queries, keys and values
        ("gemma3_text", packed_format(8, -1)),  # output and embedding are one
        ("mixtral", gptq_format(4, 16)),  # experts apart in the file, together in the model
        ("qwen3_moe", fp8_blocks((32, 16))),
    ],
    ids=lambda each: each if isinstance(each, str) else each.settings["quant_method"],
)
def test_families_whose_matrices_have_names_and_shapes_of_their_own(
    tmp_path: Path, family: str, how: Format
) -> None:
    source, folder = saved(family, tmp_path / "source"), tmp_path / "model"
    full = write_quantized(folder, source, how)
    check_same(loaded(folder).state_dict(), in_full_width(source, full).state_dict())


def test_the_experts_of_gpt_oss_are_those_of_transformers_reading(tmp_path: Path) -> None:
    folder, plain = saved("gpt_oss", tmp_path / "model"), Full()
    random = torch.Generator().manual_seed(1)
    file = folder / "model.safetensors"
    stored = Full()
    for name, tensor in load_file(file).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, inside, outside = tensor.shape
        size = (experts, outside, inside // 32)
        stored[f"{name}_blocks"] = torch.randint(
            256, (*size, 16), dtype=torch.uint8, generator=random
        )
        stored[f"{name}_scales"] = torch.randint(
            118, 124, size, dtype=torch.uint8, generator=random
        )
        parts = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        plain[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    about = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    check_same(loaded(folder).state_dict(), plain)


def kept(how: Format, *full: str, **more: Any) -> Format:
    """The format, but for weights whose names contain one of `full`."""
    encode = how.encode
    return replace(
        how,
        encode=lambda name, weight: (
            None if any(each in name for each in full) else encode(name, weight)
        ),
        settings=dict(how.settings) | more,
    )


def by_name(settings: dict[str, Any], fewer: Format, more: Format, **named: Any) -> Format:
    """`more` for what is of attention, `fewer` for the rest."""

    def encode(name: str, weight: torch.Tensor) -> Any:
        return (more if "self_attn" in name else fewer).encode(name, weight)

    return Format(settings | named, encode)


def groups(kind: str, *kinds: str | None) -> dict[str, Any]:
    """compressed-tensors with two groups: 8 bits for attention by a pattern, 4 bits for two names."""
    own = [{"format": each} if each else {} for each in kinds or (None, None)]
    wide = dict(num_bits=8, type="int", strategy="channel", symmetric=True)
    narrow = dict(num_bits=4, type="int", strategy="group", group_size=16, symmetric=False)
    rest = [f"model.layers.{layer}.mlp.{each}_proj" for layer in (0, 1) for each in ("up", "gate")]
    return dict(
        quant_method="compressed-tensors", format=kind, ignore=["lm_head", "re:.*down.*"],
        config_groups={
            "group_0": {"targets": ["re:.*self_attn.*"], "weights": wide} | own[0],
            "group_1": {"targets": [*rest, "model.layers.1.mlp.down_proj"], "weights": narrow} | own[1],
        },
    )  # fmt: skip


GPTQ4, GPTQ8 = gptq_format(4, 16), gptq_format(8, 32)
ROUND = dict(
    quant_method="auto-round", bits=4, group_size=16, packing_format="auto_round:auto_gptq"
)
OLD_AWQ = dict(zero_point=True, q_group_size=32, w_bit=4, version="GEMM")
MIXED: dict[str, Format] = {
    "gptq: some in full width": kept(GPTQ4, "layers.0.self_attn.o_proj", "down_proj"),
    "gptq: the output, too": replace(
        GPTQ4,
        where=re.compile(r".*_proj\.weight|lm_head\.weight"),
        settings=dict(GPTQ4.settings, lm_head=True),
    ),
    "gptq: 8 bits for attention": by_name(
        dict(GPTQ4.settings), GPTQ4, GPTQ8,
        dynamic={r"+:.*\.self_attn\..*": {"bits": 8, "group_size": 32}},
    ),
    "gptq: layer 0 in full width": kept(GPTQ4, "layers.0.", dynamic={r"-:model\.layers\.0\.": {}}),
    "gptq: told in its own file": replace(
        GPTQ4, settings={}, files={"quantize_config.json": dict(bits=4, group_size=16, desc_act=False)}
    ),
    "awq: some in full width": kept(
        awq_format(16), "gate_proj", modules_to_not_convert=["gate_proj"]
    ),
    "awq: told in its own file": replace(
        awq_format(32), settings={}, files={"quant_config.json": OLD_AWQ}
    ),
    "auto-round: 8 bits for attention": by_name(
        ROUND, GPTQ4, GPTQ8, extra_config={".*self_attn.*": {"bits": 8, "group_size": 32}}
    ),
    "auto-round: names": kept(
        replace(GPTQ4, settings=ROUND), "layers.1.mlp.up_proj",
        extra_config={"model.layers.1.mlp.up_proj": {"bits": 16}},
    ),
    "auto-round: awq": replace(
        awq_format(32), settings=ROUND | {"group_size": 32, "packing_format": "auto_round:auto_awq"}
    ),
    "compressed-tensors: two groups": kept(
        by_name(groups("pack-quantized"), packed_format(4, 16, symmetric=False), packed_format(8, -1)),
        "down_proj",
    ),
    "compressed-tensors: two formats": kept(
        by_name(
            groups("mixed-precision", "int-quantized", "pack-quantized"),
            packed_format(4, 16, symmetric=False), int8_format(symmetric=True, dynamic=True),
        ),
        "down_proj",
    ),
    "compressed-tensors: its first field": replace(packed_format(4, 32), key="compression_config"),
    "fbgemm": Format(
        dict(quant_method="fbgemm_fp8", activation_scale_ub=1200.0),
        lambda _, weight: fp8_parts(weight, 1, None, "weight_scale"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_some_matrices_are_stored_in_another_way(tmp_path: Path, llama: Path, name: str) -> None:
    full = write_quantized(tmp_path / "model", llama, MIXED[name])
    check_same(restored(tmp_path / "model"), full)


def test_half_precision_is_rounded_once(tmp_path: Path, llama: Path) -> None:
    how = FORMATS["gptq 8 bits, zero points, act-order"]
    full = write_quantized(tmp_path / "model", llama, how)
    check_same(restored(tmp_path / "model", torch.bfloat16), full)


def test_tokens_are_those_of_transformers_on_the_weights_in_full_width(tmp_path: Path) -> None:
    source, folder = saved("qwen2", tmp_path / "source"), tmp_path / "model"
    how = kept(FORMATS["gptq 4 bits, act-order"], "layers.0.self_attn.o_proj")
    model, prompts = in_full_width(source, write_quantized(folder, source, how)), texts(320)
    with LLM(str(folder), dtype="float32") as llm:
        answers = llm.generate(prompts, GREEDY, max_new_tokens=40, ignore_eos=True)
    for ids, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == greedy(model, ids, 40)


def change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Replace one tensor of the file."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("group", [-3, 2, 1 << 30])
def test_a_group_that_is_not_there_is_told(tmp_path: Path, llama: Path, group: int) -> None:
    folder, name = tmp_path / "model", "model.layers.1.mlp.up_proj"
    write_quantized(folder, llama, FORMATS["gptq 4 bits"])
    change(folder, f"{name}.g_idx", torch.full((64,), group, dtype=torch.int32))
    with pytest.raises(ModelError, match=rf"{name}.weight is damaged: a column is of a group"):
        restored(folder)


@pytest.mark.parametrize(
    ("index", "is_told"), [([0, 0, 1, 1], True), ([-1] * 4, False), ([-1, -1, 0, 0], None)]
)
def test_an_index_counts_unless_nothing_of_it_was_set(
    index: list[int], is_told: bool | None
) -> None:
    parts = {INDEX: torch.tensor(index, dtype=torch.int32)}
    if is_told is None:
        with pytest.raises(IndexError):
            _index(parts)
        return
    found = _index(parts)
    assert (found.tolist() == index) if is_told else (found is None)


def test_an_index_of_another_length_than_the_columns_is_told(tmp_path: Path, llama: Path) -> None:
    """The header allows for a word that is not full; weight_shape says that there is none."""
    folder, name = tmp_path / "model", "model.layers.1.mlp.up_proj"
    write_quantized(folder, llama, FORMATS["packed 4 bits"])
    change(folder, f"{name}.weight_g_idx", torch.zeros(63, dtype=torch.int32))
    with pytest.raises(ModelError, match=r"weight_g_idx has 63 numbers for 64 columns"):
        restored(folder)


def test_a_shape_that_its_words_do_not_have_is_told(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "model"
    write_quantized(folder, llama, FORMATS["packed 4 bits"])
    change(folder, "model.layers.1.mlp.up_proj.weight_shape", torch.tensor([96, 1 << 40]))
    with pytest.raises(ModelError, match=r"its weight_shape is \[96, 1099511627776\]"):
        restored(folder)


def test_a_bias_that_the_model_has_no_place_for_is_told(tmp_path: Path, llama: Path) -> None:
    """AutoGPTQ's first versions wrote one of zeros for every matrix: those change nothing."""
    folder, name = tmp_path / "model", "model.layers.1.mlp.up_proj.bias"
    write_quantized(folder, llama, FORMATS["gptq 4 bits"])
    right = loaded(folder).state_dict()
    change(folder, name, torch.zeros(96, dtype=torch.float16))
    check_same(loaded(folder).state_dict(), right)
    change(folder, name, torch.ones(96, dtype=torch.float16))
    with pytest.raises(ModelError, match=rf"{name} is not 0, and its model has no bias there"):
        loaded(folder)
