"""Weights: the tensors of a GGUF file as transformers stores them, one at a time.

Quantized blocks become float32 by the `gguf` package, the reference in Python of llama.cpp's formats;
F16, BF16 and F32 keep their dtype, but for norms that are changed.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from baton.gguf.config import Undo, Weight, describe
from baton.gguf.header import SIZES, Tensor, read_header

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in transformers and tensor of every weight. Raises ModelError for a file that is not read."""
    for weight in describe(read_header(path)).weights:
        yield weight.name, _restored(weight)


def weight_count(path: Path) -> int:
    """The number of numbers in all tensors."""
    tensors = (weight.tensor for weight in describe(read_header(path)).weights)
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors)


def _restored(weight: Weight) -> torch.Tensor:
    tensor = _floats(weight.tensor)
    if weight.undo is Undo.MINUS_ONE:
        return tensor.float() - 1
    if weight.undo is Undo.HALVES:
        return _halves_apart(tensor, weight.head)
    return tensor


def _floats(tensor: Tensor) -> torch.Tensor:
    raw = np.fromfile(tensor.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    kind = SIZES[tensor.kind][0]
    if kind in PLAIN:
        return torch.from_numpy(raw).view(PLAIN[kind]).view(tensor.shape)
    from gguf import GGMLQuantizationType, dequantize  # 0.3 s, for quantized files only

    rows = raw.reshape(*tensor.shape[:-1], -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType[kind])).view(tensor.shape)


def _halves_apart(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Rows 0 1 2 3 4 5 of each head become 0 2 4 1 3 5: the two of a pair are half a head apart."""
    pairs = weight.view(-1, head // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).flatten(0, 2)
