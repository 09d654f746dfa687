"""Packed linears: oneDNN matrix products with prepacked weights, for forwards that run in torch
(models that cannot be compiled, and machines without a compiler).

torch's linear is 2 to 8 times slower in fp32 at small batches (docs/performance.md). The two
operations are part of torch but not public. A build of torch may lack them, and a CPU may lack a
dtype (bfloat16 needs AVX-512 or AVX-NE-CONVERT on x86-64). The linear is then left unchanged.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

TYPICAL_ROWS = 16
"""The batch size the layout is optimised for. Measured: good from 1 to 512 rows, unlike one for 1 row."""


class PackedLinear(nn.Module):
    """rows [..., K] @ weight.T + bias, weight [N, K] packed. `weight` has the dtype, shape and device
    that model code asks for, and one number. A model that reads the numbers finds NaN, which shows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight.new_full((1, 1), torch.nan).expand(weight.shape)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
        self.bias = bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, self.bias, "none", [], ""
        )
        return product


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch supports packed weights of this dtype on this CPU."""
    try:
        PackedLinear(torch.zeros(1, 1, dtype=dtype), None)(torch.zeros(1, 1, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True


def pack_linears(model: nn.Module) -> int:
    """Replace a CPU model's linears by packed ones, if their dtype can be packed. Returns how many. A
    weight with another user (an lm_head tied to the embedding) is in memory twice from then on."""
    packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear | Conv1D) or type(child) not in (nn.Linear, Conv1D):
                continue  # a subclass may compute something else
            weight = child.weight if isinstance(child, nn.Linear) else child.weight.t()
            if can_pack(weight.dtype):
                module.add_module(name, PackedLinear(weight.detach(), child.bias))
                packed += 1
    return packed
