"""Mixtures of experts in a traced forward: one operation for each product whose weight a token chooses.

transformers lets a function of another's compute a model's experts (`ExpertsInterface`), as it does with
attention. Ours keeps the model's own gate, activation and bias, and adds up a token's experts in the
order in which its router lists them. mixtures.py makes a grouped product of the operation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "baton"

_library = torch.library.Library("baton", "FRAGMENT")
_library.define("grouped(Tensor rows, Tensor chosen, Tensor weight, Tensor? bias) -> Tensor")


def _grouped(
    rows: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """rows [T, K] or [T, slots, K], chosen [T, slots], weight [experts, N, K], bias [experts, N] ->
    [T, slots, N]."""
    return rows.new_empty(*chosen.shape, weight.shape[1])


_library.impl("grouped", _grouped, "Meta")


def _experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of a module of experts: [T, hidden], [T, slots], [T, slots] -> [T, hidden]."""

    def product(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        if self.is_transposed:
            weight = weight.transpose(1, 2)
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        result: torch.Tensor = torch.ops.baton.grouped(rows, top_k_index, weight, bias)
        return result

    if self.has_gate:
        inner = self._apply_gate(product(hidden_states, "gate_up_proj"))
    else:
        inner = self.act_fn(product(hidden_states, "up_proj"))
    found = product(inner, "down_proj")  # [T, slots, hidden]
    if self.has_post_expert_norm:
        found = self.post_expert_norm(found)
    total = found[:, 0] * top_k_weights[:, 0, None]
    for slot in range(1, top_k_index.shape[1]):
        total = total + found[:, slot] * top_k_weights[:, slot, None]
    return total.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def own_kind(model: PreTrainedModel) -> bool:
    """Whether it has experts of its own kind: their weights are [experts, n, k], and their code does not
    ask transformers' interface."""
    return any(
        any(weight.ndim == 3 for weight in module.parameters(recurse=False))
        and not hasattr(module, "is_transposed")
        for module in model.modules()
    )


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's experts are our operations."""
    configs: dict[int, Any] = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    before = {each: config._experts_implementation for each, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = NAME
    try:
        yield
    finally:
        for each, config in configs.items():
            config._experts_implementation = before[each]
