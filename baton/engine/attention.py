"""Paged attention for every model: writes keys and values into the pool and attends to it.

transformers calls `paged_attention` in place of its own (see loading.py, which registers it). The
state of a forward is the model's keyword argument `baton`, an AttentionContext. There is no global
state, and a probe can replace the pool.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.engine.batch import Batch
from baton.engine.pool import Pool
from baton.errors import ModelError
from baton.kv.layout import INT8

NAME = "baton_paged"

AfterLayer = Callable[[int], None]

# Arguments from transformers without effect here: rotated queries already contain the positions.
# Arguments called output_... request outputs that are not used.
HARMLESS = {"position_ids", "cache_position", "use_cache"}


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """The parameters of a layer's attention."""

    scaling: float
    window: int | None = None  # a query attends to itself and the window - 1 tokens before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: torch.Tensor | None = None  # [heads]: an additional score per head, without a value


class AttentionContext(Protocol):
    """Computes the attention of one forward: one call per layer, in the model's order."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """query [1, H, T, Dk], key [1, KVH, T, Dk], value [1, KVH, T, Dv] -> [1, T, H, Dv]."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    baton: AttentionContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls. ModelError for unknown arguments, because ignoring them could
    change the result."""
    baton = baton or getattr(module, "baton", None)  # see DROPS_ARGUMENTS in loading.py
    refused = [
        name
        for name, given in others.items()
        if given is not None and name not in HARMLESS and not name.startswith("output_")
    ]
    if attention_mask is not None:
        refused.append("attention_mask")
    if is_causal is False:
        refused.append("is_causal=False")
    if dropout:
        refused.append("dropout")
    if baton is None:
        refused.append("a forward that does not pass its keyword arguments on")
    if refused or baton is None:
        raise ModelError(
            f"{type(module).__name__} cannot be served: attention uses {', '.join(refused)}"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    params = AttentionParams(scaling, sliding_window, softcap, s_aux)
    return baton.attend(query, key, value, params), None


class Kernel(Protocol):
    """Attention of packed queries [T, H, Dk] over one layer of the pool -> [T, H, Dv]."""

    def __call__(
        self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
    ) -> torch.Tensor: ...


class PagedForward:
    """The AttentionContext of one forward over a pool. Layers are numbered in the order of calls."""

    def __init__(
        self,
        pool: Pool,
        batch: Batch[torch.Tensor],
        kernel: Kernel,
        after_layer: AfterLayer | None = None,
    ) -> None:
        self.pool = pool
        self.batch = batch
        self.kernel = kernel
        self.after_layer = after_layer
        self.layers_done = 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        layer = self.layers_done
        self.layers_done += 1
        self.pool.write(layer, self.batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self.after_layer is not None:
            self.after_layer(layer)  # KV may be sent while the attention is computed
        packed = query[0].transpose(0, 1)
        if self.pool.layout.dtype != INT8:
            packed = packed.to(self.pool.keys[layer].dtype)
        return self.kernel(packed, self.pool, layer, params)[None]
