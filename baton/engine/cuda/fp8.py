"""FP8 weights: a model's linears in float8_e4m3, with a scale for each row of the weight and one for
each token. Half of bf16's bytes, and twice its rate on cards from compute capability 8.9 on.

    y[t, n] = (x8[t] . w8[n]) * x_scale[t] * w_scale[n]

A row's scale puts its largest number at the type's largest, 448; three bits of mantissa keep each
number to 1/16 of itself. What stays as it is: embeddings and lm_head (their errors go straight into
the logits), sizes that are no multiples of 16, experts that are no linears of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16  # of both sides of a weight: what the product's kernels need


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of numbers: values * scales."""

    values: torch.Tensor  # float8_e4m3 [R, K]
    scales: torch.Tensor  # f32 [R, 1]


Product = Callable[[Quantized, Quantized], torch.Tensor]  # rows [T, K], weight [N, K] -> [T, N]


def quantize(rows: torch.Tensor) -> Quantized:
    """[R, K], each row by itself. A row of zeros stays one. In the order the product wants them,
    whatever `rows` is a view of."""
    rows = rows.float().contiguous()
    scales = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(1e-12)
    return Quantized((rows / scales).clamp(-LARGEST, LARGEST).to(FP8), scales)


def in_fp8(rows: Quantized, weight: Quantized) -> torch.Tensor:
    """On the card's FP8 units. bf16: the only result that row scales have there."""
    return torch._scaled_mm(
        rows.values,
        weight.values.t(),
        scale_a=rows.scales,
        scale_b=weight.scales.t(),
        out_dtype=torch.bfloat16,
    )


def dequantized(rows: Quantized, weight: Quantized) -> torch.Tensor:
    """The slow sibling: the same numbers, multiplied in fp32 on any device."""
    return (rows.values.float() * rows.scales) @ (weight.values.float() * weight.scales).t()


class Fp8Linear(nn.Module):
    """rows [..., K] @ weight.T + bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, product: Product) -> None:
        super().__init__()
        self.weight = quantize(weight)
        self.bias = bias
        self.product = product

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product = self.product(quantize(rows.flatten(0, -2)), self.weight).to(rows.dtype)
        product = product if self.bias is None else product + self.bias
        return product.unflatten(0, rows.shape[:-1])


def quantize_linears(model: PreTrainedModel, product: Product) -> int:
    """Put FP8 ones in the place of a model's linears, one after another; how many."""
    done, head = 0, model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) not in (nn.Linear, Conv1D) or child is head:
                continue
            weight = child.weight if type(child) is nn.Linear else child.weight.t()
            if any(size % MULTIPLE for size in weight.shape):
                continue
            module.add_module(name, Fp8Linear(weight.detach(), child.bias, product))
            done += 1
    return done
