"""Keys and values in 8 bits: each head of each token has int8 numbers and one scale, a float32.

    a head in the pool:  | number 0 | number 1 | ... | the scale's four bytes |      int8 [dim + 4]

The scale is the largest size of the head's numbers, divided by 127, so a number is off by half a scale at
most. It depends on this token alone: a token's bytes are the same whatever else is in its block, and
whenever it is written again. The C++ of native/attention_narrow.h gives the same bytes.

A head with a number that is infinite or NaN becomes NaN, so that the logits show it.
"""

import torch

from baton.kv.layout import SCALE_BYTES

MOST = 127
LEAST = torch.finfo(torch.float32).tiny
"""Smaller scales have fewer digits; a head that would have one is 0."""


def narrowed(numbers: torch.Tensor) -> torch.Tensor:
    """[..., dim] in any float dtype -> int8 [..., dim + 4]."""
    exact = numbers.float()
    scales = exact.abs().amax(dim=-1, keepdim=True) / torch.full(
        (), float(MOST), device=exact.device
    )
    scales = torch.where(scales < LEAST, 0.0, scales)
    nearest = (exact / scales).nan_to_num(0.0, 0.0, 0.0).round().clamp(-MOST, MOST)
    return torch.cat([nearest.to(torch.int8), scales.contiguous().view(torch.int8)], dim=-1)


def widened(heads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., dim + 4] -> [..., dim] in `dtype`, rounded once."""
    scales = heads[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    return (heads[..., :-SCALE_BYTES].float() * scales.view(torch.float32)).to(dtype)


def head_dim(pool: torch.Tensor) -> int:
    """The size of a head in a layer's keys or values [blocks, block_size, kv_heads, ...] of a pool."""
    return pool.shape[-1] - (SCALE_BYTES if pool.dtype == torch.int8 else 0)
