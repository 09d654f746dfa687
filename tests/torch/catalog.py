"""Every causal language model that the installed transformers knows, made tiny.

A config is shrunk by the names of its fields, so a family that the next release adds is in the catalog by
itself. PECULIAR holds what a family needs beyond that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baton.engine.loading import prepare
from tests.torch.families import random_model, save_model, sizes

NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
CONTEXT = 256
MOST_WEIGHTS = 5_000_000  # of a tiny model

SMALL = sizes(layers=3, context=CONTEXT)
"""Values by the names of fields. The window is shorter than the prompts, and 3 layers are enough for two
kinds of layers that take turns."""

PECULIAR: dict[str, dict[str, Any]] = {
    "cohere": dict(logit_scale=1.0),
    "cohere2": dict(logit_scale=1.0),
    "cohere2_moe": dict(logit_scale=1.0),
    "gemma2": dict(query_pre_attn_scalar=24, attn_logit_softcapping=2.0),
    "gpt_neox": dict(rotary_pct=0.25),
    "phi3": dict(original_max_position_embeddings=CONTEXT),
    **{
        family: dict(use_sliding_window=True, max_window_layers=1)
        for family in ("qwen2", "qwen3", "qwen3_moe")  # the window of qwen2_moe is refused
    },
    "stablelm": dict(use_qkv_bias=True, qk_layernorm=True),
    **{family: dict(num_kv_shared_layers=0) for family in ("gemma4_text", "gemma4_unified_text")},
    "gemma3n_text": dict(num_kv_shared_layers=0, activation_sparsity_pattern=[0.5, 0.0, 0.5]),
    "ministral3": dict(
        rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64,
            llama_4_scaling_beta=0.1, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
        )
    ),
    "zaya": dict(num_experts_per_tok=1),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=theta)
            for kind, theta in (("sliding_attention", 10000.0), ("full_attention", 50000.0))
        },
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
    ),
}  # fmt: skip


class NotBuilt(Exception):
    """transformers cannot make this family small, or not from a config alone."""


def tiny_config(family: str) -> Any:
    """A config of this family, shrunk by the names of its fields."""
    kind = type(AutoConfig.for_model(family))
    fields = {*getattr(kind, "__dataclass_fields__", {}), *getattr(kind, "attribute_map", {})}
    known = {name: value for name, value in SMALL.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention: keys of all heads come from one latent vector
        known["num_key_value_heads"] = SMALL["num_attention_heads"]
    return AutoConfig.for_model(family, **known | PECULIAR.get(family, {}))


def tiny_model(family: str, seed: int = 0, *, attention: str = "eager") -> PreTrainedModel:
    """A random model in fp32 on the CPU. No weight is 0 or 1. NotBuilt if there is none that small."""
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        weights = sum(each.numel() for each in shape.parameters())
        if weights > MOST_WEIGHTS:
            raise NotBuilt(f"its smallest has {weights / 1e6:.0f} million weights")
        model = random_model(config, seed, attention=attention)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    return prepare(model)


def save_config(family: str, folder: Path) -> None:
    """Its config.json alone: enough for what is refused by name, before any weight is looked for."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        config = AutoConfig.for_model(family)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    config.save_pretrained(folder)


def save_tiny(family: str, folder: Path) -> None:
    """A complete model folder of such a model."""
    save_model(tiny_model(family), folder)


def text_families() -> Iterator[str]:
    """Those that are not a part of, or a wrapper around, one with another name."""
    yield from (name for name in NAMES if f"{name}_text" not in NAMES)
