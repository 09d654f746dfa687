"""Shape: the size of a model, and the bytes and operations of a forward. Pure, from config.json.

Dense models only. A token of a mixture of experts reads some of the weights, and the config does not say
which.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.dtypes import WEIGHT_DTYPES
from baton.errors import InputError
from baton.model_files import ModelFiles
from tools.measure.limits import Work

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
INNER = ("intermediate_size", "ffn_dim", "n_inner")
GATED = ("silu", "gelu_pytorch_tanh")  # activations of a gated MLP, which has three matrices
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, **dict.fromkeys(WEIGHT_DTYPES, 1)}


@dataclass(frozen=True, slots=True)
class Shape:
    """Number of weights (without norms and biases, under a thousandth) and of KV values."""

    layers: int  # weights of all layers, read once a step and multiplied once a token
    head: int  # weights of the lm_head
    embedding: int  # weights of lookup tables; a table tied to the lm_head is not counted again
    kv_values: int  # of one token, all layers
    query_values: int  # of one token, all layers

    @property
    def weights(self) -> int:
        """All weights that memory holds."""
        return self.layers + self.head + self.embedding

    def work(
        self,
        *,
        tokens: int,
        answers: int,
        cached: int,
        dtype: str,
        head_dtype: str | None = None,
        pairs: float = 0.0,
    ) -> Work:
        """A forward of `tokens`, of which `answers` need logits, over `cached` tokens of KV. `head_dtype`
        is that of the lm_head where it differs. Attention counts by its `pairs` of a query and a key, 0
        to leave it out."""
        size, cache_size = ITEM_BYTES[dtype], max(2, ITEM_BYTES[dtype])
        head_size = ITEM_BYTES[head_dtype or dtype]
        head = self.head if answers else 0
        return Work(
            weight_bytes=float(size * self.layers + head_size * head),
            kv_bytes=float(cache_size * self.kv_values * cached),
            flops=2.0 * (tokens * self.layers + answers * head) + 4.0 * self.query_values * pairs,
        )


def required_shape(files: ModelFiles) -> Shape:
    """As shape_of, but raises InputError instead of returning None."""
    if (shape := shape_of(files.config)) is None:
        raise InputError(
            f"the config.json of {files.name} does not say how many bytes a step reads: use a dense model"
        )
    return shape


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape. None for a mixture of experts and for an incomplete config."""
    hidden = config.get("hidden_size") or config.get("n_embd")
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_attention_heads") or config.get("n_head")
    if not (hidden and layers and heads) or any(config.get(name) for name in EXPERTS):
        return None
    head_dim = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head_dim
    inner = next((config[name] for name in INNER if config.get(name)), 4 * hidden)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    gates = 3 if activation in GATED else 2
    attention = hidden * (2 * heads * head_dim + 2 * kv)
    table = hidden * config["vocab_size"]
    tied = config.get("tie_word_embeddings", True)
    return Shape(
        layers=layers * (attention + gates * hidden * inner),
        head=table,
        embedding=(0 if tied else table) + hidden * config.get("n_positions", 0),
        kv_values=2 * layers * kv,
        query_values=layers * heads * head_dim,
    )
