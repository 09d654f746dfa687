"""Tiny quantized checkpoints of every format, written number by number, and the same models in full
width.

The packing here follows the formats' own programs (AutoGPTQ's and AutoAWQ's loops over words,
compressed-tensors' shifts). Nothing is shared with what reads them.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.torch.families import make_model, save_model

Array = np.ndarray[Any, Any]
Tensors = dict[str, torch.Tensor]
HALF = torch.float16
LAYERS = re.compile(r".*\.\d+\..*(_proj|w[123]|c_\w+)\.weight")
"""The matrices of the layers, by their names in a file."""


@dataclass(frozen=True)
class Matrix:
    """Integers [out, in] with the scale and zero point of each group [out, groups]."""

    values: Array
    scales: Array
    zeros: Array
    groups: Array  # [in]: the group of each column

    def full(self) -> torch.Tensor:
        """In float32. Each product of an integer and a scale of 16 bits is exact."""
        spread = self.scales.astype(np.float32)[:, self.groups]
        whole = (self.values - self.zeros[:, self.groups]).astype(np.float32) * spread
        return torch.from_numpy(whole)


def rounded(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool = False, shuffled: bool = False
) -> Matrix:
    """`weight` [out, in] in integers from 0. `shuffled`: the columns belong to groups in no order."""
    rows, columns = weight.shape
    size = columns if group == -1 else group
    groups = np.arange(columns) // size
    if shuffled:
        groups = np.random.default_rng(rows).permutation(groups)
    most = (1 << bits) - 1
    numbers = weight.double().numpy()
    scales = np.zeros((rows, groups.max() + 1), dtype=np.float16)
    zeros = np.zeros_like(scales, dtype=np.int64)
    for each in range(scales.shape[1]):
        some = numbers[:, groups == each]
        if symmetric:
            scales[:, each] = 2 * np.abs(some).max(1) / most
            zeros[:, each] = 1 << (bits - 1)
        else:
            low, high = np.minimum(some.min(1), 0), np.maximum(some.max(1), 0)
            scales[:, each] = (high - low) / most
            zeros[:, each] = np.clip(np.round(-low / scales[:, each].astype(float)), 0, most)
            zeros[::5, each], zeros[1::5, each] = 0, most  # the ends of the range, too
    spread = scales.astype(float)[:, groups]
    values = np.clip(np.round(numbers / spread) + zeros[:, groups], 0, most)
    return Matrix(values.astype(np.int64), scales, zeros, groups)


def words(numbers: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Integers [rows, columns] in words of 32 bits, along the columns, the first lowest."""
    each = 32 // bits
    found = np.zeros((numbers.shape[0], -(-numbers.shape[1] // each)), dtype=np.uint32)
    for column in range(found.shape[1]):
        for place in range(each):
            source = column * each + (order[place] if order else place)
            if source < numbers.shape[1]:
                found[:, column] |= numbers[:, source].astype(np.uint32) << np.uint32(place * bits)
    return found


def int32(found: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(found).view(np.int32).copy())


def half(found: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(found))


def gptq(matrix: Matrix, bits: int, *, less_one: bool, with_index: bool = True) -> Tensors:
    zeros = words(matrix.zeros.T, bits)
    if less_one:  # of whole words, as GPTQModel does: a borrow goes into the next number
        zeros = (
            zeros.astype(np.int64) - int("".join(["0" * (bits - 1) + "1"] * (32 // bits)), 2)
        ) % (1 << 32)
    found = {
        "qweight": int32(words(matrix.values, bits).T),
        "qzeros": int32(zeros.astype(np.uint32)),
        "scales": half(matrix.scales.T),
    }
    if with_index:
        found["g_idx"] = torch.from_numpy(matrix.groups.astype(np.int32))
    return found


def awq(matrix: Matrix) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": int32(words(matrix.values.T, 4, order)),
        "qzeros": int32(words(matrix.zeros.T, 4, order)),
        "scales": half(matrix.scales.T),
    }


def packed(matrix: Matrix, bits: int, *, symmetric: bool, with_index: bool = False) -> Tensors:
    found = {
        "weight_packed": int32(words(matrix.values, bits)),
        "weight_scale": half(matrix.scales),
        "weight_shape": torch.tensor(matrix.values.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = int32(words(matrix.zeros.T, bits).T)
    if with_index:
        found["weight_g_idx"] = torch.from_numpy(matrix.groups.astype(np.int32))
    return found


def signed(matrix: Matrix, *, symmetric: bool) -> Tensors:
    """Integers of 8 bits around 0."""
    found = {
        "weight": torch.from_numpy((matrix.values - 128).astype(np.int8)),
        "weight_scale": half(matrix.scales),
    }
    if not symmetric:
        found["weight_zero_point"] = torch.from_numpy((matrix.zeros - 128).astype(np.int8))
    return found


def fp8(
    weight: torch.Tensor, rows: int | None, columns: int | None
) -> tuple[Tensors, torch.Tensor]:
    """FP8 with a float32 factor for each block of so many rows and columns: the parts, and the full
    width."""
    height, width = rows or weight.shape[0], columns or weight.shape[1]
    factors = torch.empty(-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    whole = torch.empty(weight.shape)
    for down in range(factors.shape[0]):
        for right in range(factors.shape[1]):
            place = (
                slice(down * height, (down + 1) * height),
                slice(right * width, (right + 1) * width),
            )
            factors[down, right] = weight[place].abs().max() / 448
            numbers[place] = (weight[place] / factors[down, right]).to(torch.float8_e4m3fn)
            whole[place] = numbers[place].float() * factors[down, right]
    return {"weight": numbers, "factors": factors}, whole


Encode = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None]
"""Name and weight [out, in] to the tensors of its module, and the weight in full width. None: not
quantized."""


@dataclass(frozen=True)
class Format:
    """A way to write a checkpoint."""

    settings: Mapping[str, Any]
    encode: Encode
    where: re.Pattern[str] = LAYERS
    key: str = "quantization_config"
    files: Mapping[str, Any] = field(default_factory=dict)  # JSON files beside config.json


def saved(family: str, folder: Path) -> Path:
    """A random model of this family, whose checkpoint the others are written from."""
    return save_model(make_model(family, attention="eager"), folder)


def write_quantized(folder: Path, source: Path, how: Format) -> Tensors:
    """The checkpoint in `folder`, of the model in `source`. Returns its weights in full width."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    turned = config["model_type"] == "gpt2"  # it keeps its matrices as [in, out]
    stored, full = Tensors(), Tensors()
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.T if turned and tensor.ndim == 2 else tensor
        made = how.encode(name, weight) if how.where.fullmatch(name) else None
        if made is None:
            stored[name] = full[name] = tensor
            continue
        parts, whole = made
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": each.contiguous() for part, each in parts.items()}
        full[name] = (whole.T if turned else whole).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if how.settings:
        config[how.key] = dict(how.settings)
    (folder / "config.json").write_text(json.dumps(config))
    for file, content in how.files.items():
        (folder / file).write_text(json.dumps(content))
    return full


def in_full_width(source: Path, full: Tensors) -> PreTrainedModel:
    """transformers' reading of the model in `source` with these weights."""
    plain = source.with_name(f"{source.name}-plain")
    shutil.copytree(source, plain)
    save_file(full, plain / "model.safetensors", metadata={"format": "pt"})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    return model.eval()
