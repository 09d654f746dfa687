"""FP8 weights: a model's linears in float8_e4m3, with a scale for each row of the weight and each
token. Half the bytes of bf16 and twice its rate on cards of compute capability 8.9 or higher.

    y[t, n] = (x8[t] . w8[n]) * x_scale[t] * w_scale[n]

A row's scale maps its largest number to the dtype's largest, 448. With three bits of mantissa the
relative error of a number is at most 1/16. Not quantized: embeddings and lm_head (their errors affect
the logits directly), routers (an error may choose another expert), sizes that are not multiples of 16,
experts that are not linear modules.
"""

import weakref
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
    is a transposed view.

    Five kernels: a row's largest number in one pass, and no clamp, because a number divided by its row's
    scale exceeds 448 by rounding at most, which the conversion rounds down."""
    rows = rows.contiguous()
    largest = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scales = (largest / LARGEST).clamp_min(1e-12)
    return Quantized((rows / scales).to(FP8), scales)


class Shared:
    """Quantizes rows once for all linears that take them: q, k and v, or gate and up. They come as the
    same tensor, one after the other."""

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._rows: Quantized | None = None

    def quantized(self, rows: torch.Tensor) -> Quantized:
        """Of rows [..., K], flattened. The result is kept while the tensor lives, or until the next."""
        if self._of is None or self._of() is not rows or self._rows is None:
            self._rows = None  # its memory is free for the next
            self._rows = quantize(rows.flatten(0, -2))
            self._of = weakref.ref(rows, self._forget)
        return self._rows

    def _forget(self, of: "weakref.ref[torch.Tensor]") -> None:
        if self._of is of:
            self._of = self._rows = None


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

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        product: Product,
        shared: Shared | None = None,
    ) -> None:
        super().__init__()
        self.shared = shared or Shared()
        self.weight = quantize(weight)
        self.bias = bias
        self.product = product

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product = self.product(self.shared.quantized(rows), self.weight).to(rows.dtype)
        product = product if self.bias is None else product + self.bias
        return product.unflatten(0, rows.shape[:-1])


def quantize_linears(model: PreTrainedModel, product: Product) -> int:
    """Replace a model's linears by FP8 ones, except lm_head and routers. Returns how many."""
    done, head, shared = 0, model.get_output_embeddings(), Shared()
    config = model.config.get_text_config(decoder=True)
    experts = {getattr(config, name, None) for name in EXPERTS}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) not in (nn.Linear, Conv1D) or child is head:
                continue
            weight = child.weight if type(child) is nn.Linear else child.weight.t()
            if weight.shape[0] in experts or any(size % MULTIPLE for size in weight.shape):
                continue
            module.add_module(name, Fp8Linear(weight.detach(), child.bias, product, shared))
            done += 1
    return done
