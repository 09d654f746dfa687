"""Base: what adapters need to know of the model they are for, noted before its linears are packed.

A packed linear (baton/engine/cpu/packed.py) is another module, without the numbers of its weight.
Adapters that come later are checked against what the model was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

ROWS = 1024
"""Of a weight that is read back at a time."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of the model."""

    out_in: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    plain: bool = True  # no subclass, which may compute something else
    head: bool = False  # it makes logits
    tied: bool = False  # its weight is also the embedding


@dataclass(frozen=True, slots=True)
class Base:
    """A PreTrainedModel and its linears by name: what peft makes products for."""

    model: Any
    linears: Mapping[str, Linear]

    @classmethod
    def of(cls, model: Any) -> "Base":
        """The model as it was loaded."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        found = {
            name: _linear(each, head=each is head, tied=each.weight is embedding.weight)
            for name, each in model.named_modules()
            if isinstance(each, nn.Linear | Conv1D)
        }
        return cls(model, found)

    @property
    def heads(self) -> list[str]:
        """The linears that make logits."""
        return [name for name, each in self.linears.items() if each.head]

    def weight(self, place: str) -> torch.Tensor | None:
        """The model's own tensor of this name; None if it has none, or it cannot be read back."""
        own = dict(self.model.named_parameters(remove_duplicate=False)).get(place)
        linear = self.linears.get(place.removesuffix(".weight"))
        if own is not None or linear is None or not place.endswith(".weight"):
            return own
        return _read_back(self.model.get_submodule(place.removesuffix(".weight")), linear)


def _linear(module: Any, *, head: bool, tied: bool) -> Linear:
    weight: torch.Tensor = module.weight
    shape = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    plain = type(module) in (nn.Linear, Conv1D)
    return Linear((shape[0], shape[1]), weight.dtype, weight.device, plain, head, tied)


def _read_back(module: Any, linear: Linear) -> torch.Tensor | None:
    """[out, in]: the products of a packed linear with single ones are the numbers of its weight, exactly.
    With a bias they are not. Its forward is called past the hooks, which add adapters."""
    if module.bias is not None:
        return None
    width = linear.out_in[1]
    ones = torch.eye(width, dtype=linear.dtype, device=linear.device)
    with torch.inference_mode():
        columns = [module.forward(ones[i : i + ROWS]) for i in range(0, width, ROWS)]
    return torch.cat(columns).t()
