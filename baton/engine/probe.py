"""Discovers the KV layout of a loaded model of any architecture, by one tiny forward.

Raises ModelError for models that do not use transformers' attention interface in every layer, or
whose attention depends on a mask: transformers expresses sliding windows and more by masks, and the
paged attention takes none.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from baton.engine.attention import AttentionParams
from baton.engine.device import dtype_name
from baton.engine.errors import unexpected
from baton.errors import ModelError
from baton.kv.layout import KVLayout, LayerShape


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of the probing forward."""

    shape: LayerShape
    window: int | None


class Probe:
    """An AttentionContext without a pool: attends to the tokens of the forward and records the calls."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.calls.append(AttentionCall(shape, params.window))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


@torch.inference_mode()
def discover_layout(model: PreTrainedModel, block_size: int, dtype: torch.dtype) -> KVLayout:
    """The layout of this model's KV pool. ModelError if it cannot be served, with the reason."""
    name = type(model).__name__
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{name} cannot be served: its forward does not take logits_to_keep")
    probe = Probe()
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    try:
        model.base_model(
            input_ids=ids, position_ids=torch.tensor([[0, 1]]).to(ids), use_cache=False, baton=probe
        )
    except TypeError as error:  # forward takes no position_ids, or drops keyword arguments
        raise ModelError(
            f"{name} cannot be served: its code needs what the engine does not give: {unexpected(error)}"
        ) from error
    config: Any = model.config.get_text_config(decoder=True)
    if len(probe.calls) != config.num_hidden_layers:
        raise ModelError(
            f"{name} cannot be served: {len(probe.calls)} of its {config.num_hidden_layers} layers "
            "call transformers' attention interface, but all of them must"
        )
    for layer, (seen, window) in enumerate(zip(probe.calls, windows(name, config), strict=True)):
        if seen.window != window and min(w for w in (seen.window, window) if w) < _context(config):
            raise ModelError(
                f"{name} cannot be served: layer {layer} attends with a window of {seen.window}, "
                f"its config.json says {window}"
            )
    return KVLayout(tuple(seen.shape for seen in probe.calls), block_size, dtype_name(dtype))


def windows(name: str, config: Any) -> list[int | None]:
    """Each layer's sliding window according to config.json; None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "sliding_attention" if window else "full_attention"
        if getattr(config, "attention_chunk_size", None):
            kind = "chunked_attention"
        kinds = [kind] * config.num_hidden_layers
    known = {"full_attention": None, "sliding_attention": window}
    if strange := sorted(set(kinds) - set(known)):
        raise ModelError(f"{name} cannot be served: it has layers of {', '.join(strange)}")
    return [known[kind] for kind in kinds]


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 2**62))
