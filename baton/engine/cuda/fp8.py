"""FP8 weights: a model's linears in float8_e4m3, with a scale for each row of the weight and each
token. Half the bytes of bf16 and twice its rate on cards of compute capability 8.9 or higher.

    y[t, n] = (x8[t] . w8[n]) * x_scale[t] * w_scale[n]

A row's scale maps its largest number to the dtype's largest, 448. With three bits of mantissa the
relative error of a number is at most 1/16. Not quantized: embeddings and lm_head (their errors affect
the logits directly), routers (an error may choose another expert), sizes that are not multiples of 16,
experts that are not linear modules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16  # both dimensions of a weight, required by the kernels


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows quantized to FP8: values * scales."""

    values: torch.Tensor  # float8_e4m3 [R, K]
    scales: torch.Tensor  # f32 [R, 1]


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where a config says how many experts a layer has: as many outputs has its router."""

Product = Callable[[Quantized, Quantized], torch.Tensor]  # rows [T, K], weight [N, K] -> [T, N]


def quantize(rows: torch.Tensor) -> Quantized:
    """Quantize each row of [R, K]. The result is contiguous, as the product requires, even if `rows`
    is a transposed view."""
    rows = rows.float().contiguous()
    scales = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(1e-12)
    return Quantized((rows / scales).clamp(-LARGEST, LARGEST).to(FP8), scales)


def in_fp8(rows: Quantized, weight: Quantized) -> torch.Tensor:
    """The product on the GPU's FP8 units. Row scales support bf16 results only."""
    return torch._scaled_mm(
        rows.values,
        weight.values.t(),
        scale_a=rows.scales,
        scale_b=weight.scales.t(),
        out_dtype=torch.bfloat16,
    )


def dequantized(rows: Quantized, weight: Quantized) -> torch.Tensor:
    """The reference: the same numbers, multiplied in fp32 on any device."""
    return (rows.values.float() * rows.scales) @ (weight.values.float() * weight.scales).t()


class Fp8Linear(nn.Module):
    """rows [..., K] @ weight.T + bias, weight [N, K] in FP8."""

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
    """Replace a model's linears by FP8 ones, except lm_head and routers. Returns how many."""
    done, head = 0, model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    experts = {getattr(config, name, None) for name in EXPERTS}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) not in (nn.Linear, Conv1D) or child is head:
                continue
            weight = child.weight if type(child) is nn.Linear else child.weight.t()
            if weight.shape[0] in experts or any(size % MULTIPLE for size in weight.shape):
                continue
            module.add_module(name, Fp8Linear(weight.detach(), child.bias, product))
            done += 1
    return done
