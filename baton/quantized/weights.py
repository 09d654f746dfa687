"""Weights: those of a quantized checkpoint in full width, one at a time."""

import math
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from baton.errors import ModelError
from baton.quantized.awq import ORDER
from baton.quantized.mxfp4 import NUMBERS, POWER_OF_ONE
from baton.quantized.numbers import ones_added, restored, unpacked
from baton.quantized.plan import (
    INDEX,
    SCALE,
    SHAPE,
    VALUES,
    ZEROS,
    Entry,
    Plan,
    Weight,
    block_for,
    blocks,
)
from baton.quantized.scheme import ROW, Layout, Scheme

Parts = dict[str, torch.Tensor]


def full_weights(
    plan: Plan, dtype: torch.dtype, conv1d: Container[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight: in `dtype` what was quantized, the others as stored. `conv1d`:
    weights that the model keeps transposed, as GPT-2 does. Raises ModelError."""
    files = _Files()
    for weight in plan.weights:
        if weight.scheme is None:
            yield weight.name, files.tensor(weight.parts[VALUES])
            continue
        parts = {role: files.tensor(entry) for role, entry in weight.parts.items()}
        try:
            full = _full(weight, weight.scheme, parts, dtype)
        except IndexError as error:
            raise ModelError(
                f"{weight.name} is damaged: a column is of a group that has no scale; fetch the model "
                "again"
            ) from error
        is_transposed = weight.scheme.layout in (Layout.GPTQ, Layout.AWQ) and weight.name in conv1d
        yield weight.name, full.t().contiguous() if is_transposed else full


class _Files:
    """The file that was read last stays open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None  # its methods have no types

    def tensor(self, entry: Entry) -> torch.Tensor:
        if self._file is None or self._path != entry.file:
            self._path, self._file = entry.file, safe_open(entry.file, framework="pt")
        found: torch.Tensor = self._file.get_tensor(entry.name)
        return found


def _full(weight: Weight, scheme: Scheme, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    match scheme.layout:
        case Layout.GPTQ:
            return _gptq(scheme, parts, dtype)
        case Layout.AWQ:
            return _awq(scheme, parts, dtype)
        case Layout.PACKED:
            return _packed(weight.name, scheme, parts, dtype)
        case Layout.MXFP4:
            return _mxfp4(parts, dtype)
    return _scaled(scheme, parts, dtype)


def _gptq(scheme: Scheme, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    zeros = parts[ZEROS]
    if scheme.zeros_less_one:
        zeros = ones_added(zeros, scheme.bits)
    rows = parts[VALUES].shape[1]
    return restored(
        unpacked(parts[VALUES].t(), scheme.bits),
        parts[SCALE].t(),
        unpacked(zeros, scheme.bits)[:, :rows].t(),
        block=scheme.block or ROW,
        index=_index(parts),
        dtype=dtype,
    )


def _awq(scheme: Scheme, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    return restored(
        unpacked(parts[VALUES], scheme.bits, ORDER).t(),
        parts[SCALE].t(),
        unpacked(parts[ZEROS], scheme.bits, ORDER).t(),
        block=scheme.block or ROW,
        index=None,
        dtype=dtype,
    )


def _packed(name: str, scheme: Scheme, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    values = unpacked(parts[VALUES], scheme.bits)
    if SHAPE in parts:
        rows, columns = (int(each) for each in parts[SHAPE])
        each = 32 // scheme.bits
        if rows != values.shape[0] or blocks(columns, each) != parts[VALUES].shape[1]:
            raise ModelError(
                f"{name} is damaged: its weight_shape is {[rows, columns]}, and weight_packed is "
                f"{list(parts[VALUES].shape)}; fetch the model again"
            )
        values = values[:, :columns]
    zeros: torch.Tensor | int = 1 << (scheme.bits - 1)
    if not scheme.symmetric:
        zeros = unpacked(parts[ZEROS].t(), scheme.bits)[:, : values.shape[0]].t()
    if INDEX in parts and len(parts[INDEX]) != values.shape[1]:
        raise ModelError(
            f"{name} is damaged: its weight_g_idx has {len(parts[INDEX])} numbers for {values.shape[1]} "
            "columns; fetch the model again"
        )
    block = block_for(scheme, tuple(parts[SCALE].shape), tuple(values.shape))
    return restored(
        values,
        _matrix(parts[SCALE]),
        zeros,
        block=block,
        index=_index(parts),
        dtype=dtype,
    )


def _mxfp4(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """A matrix at a time: [experts, in, out]."""
    numbers = torch.tensor((*NUMBERS, *(-each for each in NUMBERS)))
    made = []
    for blocks_, powers in zip(parts[VALUES], parts[SCALE], strict=True):  # [out, in / 32, 16]
        halves = torch.stack((blocks_ & 15, blocks_ >> 4), -1).flatten(2)
        floats = torch.ldexp(numbers[halves.int()], powers.int()[:, :, None] - POWER_OF_ONE)
        made.append(floats.flatten(1).t().to(dtype))
    return torch.stack(made)


def _scaled(scheme: Scheme, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    values, scales = parts[VALUES], parts[SCALE]
    block = block_for(scheme, tuple(scales.shape), tuple(values.shape))
    zeros = parts.get(ZEROS)  # of symmetric ones, too, where early versions wrote them
    stacks = values.shape[:-2]
    matrices, index = _apart(values, stacks), _index(parts)
    zeros_apart: Iterable[torch.Tensor | int] = [0] * len(matrices)
    if zeros is not None:
        zeros_apart = map(_matrix, _apart(zeros, stacks))
    made = [
        restored(one, _matrix(scale), zero, block=block, index=index, dtype=dtype)
        for one, scale, zero in zip(matrices, _apart(scales, stacks), zeros_apart, strict=True)
    ]
    joined = made[0] if len(made) == 1 else torch.stack(made)
    return joined.view(values.shape)


def _apart(numbers: torch.Tensor, stacks: tuple[int, ...]) -> torch.Tensor:
    """[matrices, ...] of [*stacks, ...]; one matrix where there is no stack."""
    return numbers.reshape(math.prod(stacks), *numbers.shape[len(stacks) :])


def _index(parts: Parts) -> torch.Tensor | None:
    """The group of each column, where it is told: not if all are -1, as llm-compressor leaves what it did
    not set. IndexError if only some are, or one is below."""
    index = parts.get(INDEX)
    if index is None or bool((index == -1).all()):
        return None
    if int(index.min()) < 0:
        raise IndexError
    return index.long()


def _matrix(numbers: torch.Tensor) -> torch.Tensor:
    """[row blocks, column blocks], of scales with fewer dimensions."""
    return numbers if numbers.ndim == 2 else numbers.reshape(-1, 1)
