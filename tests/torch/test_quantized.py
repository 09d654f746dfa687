"""Quantized checkpoints: the weights are those of the format's definition, the tokens transformers' on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton import LLM, SamplingParams
from baton.engine.loading import load_model
from baton.errors import ModelError
from baton.model_files import resolve_model
from tests.torch.families import make_model
from tests.torch.quantized_files import (
    Encode,
    Format,
    Matrix,
    awq,
    fp8,
    gptq,
    packed,
    rounded,
    signed,
    write_quantized,
)
from tests.torch.served import check_logits, texts
from tests.torch.test_gguf import greedy

CPU = torch.device("cpu")
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
        quant_method="compressed-tensors", format=kind, ignore=["lm_head"], quantization_status="compressed",
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


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve_model(str(folder)), CPU, dtype)


def reference(plain: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    return model.eval()


def check_same(mine: PreTrainedModel, theirs: PreTrainedModel) -> None:
    right = theirs.state_dict()
    assert mine.state_dict().keys() == right.keys()
    for name, weight in mine.state_dict().items():
        assert torch.equal(weight, right[name].to(weight.dtype)), name


@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_those_of_the_formats_definition(tmp_path: Path, name: str) -> None:
    original = make_model("llama", attention="eager")
    plain = write_quantized(tmp_path / "model", original, FORMATS[name])
    right = reference(plain)
    changed = right.model.layers[1].mlp.down_proj.weight
    assert not torch.equal(changed, original.model.layers[1].mlp.down_proj.weight)
    check_same(loaded(tmp_path / "model"), right)
