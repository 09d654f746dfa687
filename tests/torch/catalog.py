"""Every causal language model that the installed transformers knows, made tiny.

A config is shrunk by the names of its fields, so a family that the next release adds is in the catalog by
itself. PECULIAR holds what a family needs beyond that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baton.engine.loading import prepare
from tests.torch.families import END, VOCABULARY, make_tokenizer

NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
CONTEXT = 256
MOST_WEIGHTS = 5_000_000  # of a tiny model

_SAME: dict[int | float, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    END: "bos_token_id eos_token_id pad_token_id",
    0.1: "initializer_range",
    64: "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff prefix_dim dense_intermediate_size",
    3: "num_hidden_layers n_layer n_layers num_layers",
    4: "num_attention_heads n_head n_heads num_heads num_experts n_routed_experts num_local_experts",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts n_group",
    16: "head_dim global_head_dim kv_lora_rank index_head_dim hidden_size_per_layer_input",
    CONTEXT: "max_position_embeddings n_positions n_ctx max_target_positions",
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    24: "q_lora_rank",
    8: "qk_rope_head_dim sliding_window laurel_rank",
    32: "qk_nope_head_dim",
    12: "v_head_dim",
    1: "topk_group first_k_dense_replace num_dense_layers num_kv_shared_layers n_shared_experts",
}
SMALL = {name: value for value, names in _SAME.items() for name in names.split()}
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
        for family in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
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
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention
            )
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 1:
                        weight.add_(torch.randn_like(weight), alpha=0.2)
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
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family)
    model.generation_config = GenerationConfig(eos_token_id=END, bos_token_id=END)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))


def text_families() -> Iterator[str]:
    """Those that are not a part of, or a wrapper around, one with another name."""
    yield from (name for name in NAMES if f"{name}_text" not in NAMES)
