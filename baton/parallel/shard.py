"""Shard: a loaded model becomes one rank's part of it, whose modules add or join what the ranks compute.

What a rank holds afterwards is a copy of its pieces, so the whole matrices are freed one by one.
"""

from typing import Any

import torch

from baton.parallel.plan import COUNTS, Plan
from baton.parallel.ranks import Ranks


def shard(model: Any, plan: Plan, ranks: Ranks) -> None:
    """Cut a PreTrainedModel's parameters in place, and let its forward join the ranks' results."""
    for name, cut in plan.cuts.items():
        _replace(model, name, lambda whole, cut=cut: cut.take(whole, ranks.rank, ranks.size))
    for name in plan.once if ranks.rank else ():
        _replace(model, name, torch.zeros_like)
    for name in plan.fewer:
        _count_less(model.get_submodule(name), ranks.size)
    for name in plan.split:
        model.get_submodule(name).register_forward_pre_hook(_take_part(ranks))
    for name in plan.sums:
        model.get_submodule(name).register_forward_hook(lambda _, __, out: ranks.sum(out))
    for name in plan.joined:
        model.get_submodule(name).register_forward_hook(lambda _, __, out: ranks.side_by_side(out))


def _replace(model: Any, name: str, make: Any) -> None:
    place, _, field = name.rpartition(".")
    module = model.get_submodule(place)
    part = make(getattr(module, field).detach())
    setattr(module, field, torch.nn.Parameter(part, requires_grad=False))
    if field == "weight":
        _count_features(module, part)


def _count_features(module: Any, weight: torch.Tensor) -> None:
    """What a layer says of its own size, which GPT-2's reads."""
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif hasattr(module, "nf"):
        module.nx, module.nf = weight.shape


def _count_less(module: Any, size: int) -> None:
    for field in COUNTS:
        if isinstance(count := getattr(module, field, None), int):
            setattr(module, field, count // size)


def _take_part(ranks: Ranks) -> Any:
    def hook(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        first, *others = given
        return (first.chunk(ranks.size, -1)[ranks.rank], *others)

    return hook
