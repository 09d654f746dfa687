"""Tiny random models of many families, each with what makes its family peculiar switched on.

`sizes` is the one table of tiny sizes: catalog.py, rope_models.py and gguf_files.py take theirs from it.
`make_model` gives one ready for the engine; `save_checkpoint` writes a complete model folder, with
a tokenizer of its own, for tests that start processes.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from baton.engine.attention import NAME
from baton.engine.loading import prepare

VOCABULARY = 320
END = 0  # <|end|>, the first special token
CONTEXT = 128
LAYERS = 2


def sizes(*, layers: int, context: int) -> dict[str, int | float]:
    """Tiny values by the names of config fields, for whatever family."""
    same: dict[int | float, str] = {
        VOCABULARY: "vocab_size vocab_size_per_layer_input",
        0.1: "initializer_range",
        64: "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size",
        96: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff prefix_dim dense_intermediate_size",
        4: "num_attention_heads n_head n_heads num_heads num_experts n_routed_experts num_local_experts",
        2: "num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts n_group",
        16: "head_dim global_head_dim kv_lora_rank index_head_dim hidden_size_per_layer_input",
        48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
        24: "q_lora_rank",
        8: "qk_rope_head_dim sliding_window laurel_rank",
        32: "qk_nope_head_dim",
        12: "v_head_dim",
        1: "topk_group first_k_dense_replace num_dense_layers num_kv_shared_layers n_shared_experts",
    }
    found = {name: value for value, names in same.items() for name in names.split()}
    found |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END)
    found |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), layers)
    lengths = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions")
    return found | dict.fromkeys(lengths, context)


SMALL = sizes(layers=LAYERS, context=CONTEXT)


def small(names: str, **more: Any) -> dict[str, Any]:
    """The values of these fields, and `more`."""
    return {name: SMALL[name] for name in names.split()} | more


COMMON = small("vocab_size initializer_range bos_token_id eos_token_id")
NARROW = small("hidden_size num_hidden_layers num_attention_heads")
WIDE = small(  # llama and its many relatives: 2 query heads to a key head
    "intermediate_size num_key_value_heads max_position_embeddings", **NARROW
)
WINDOW = small("sliding_window")  # shorter than any test sequence
LOCAL_EXPERTS = small("num_local_experts num_experts_per_tok")
EXPERTS = small("num_experts num_experts_per_tok moe_intermediate_size")

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": small("n_embd n_head n_layer n_positions"),
    "llama": dict(WIDE),
    "qwen2": dict(WIDE),
    "qwen3": dict(WIDE, head_dim=24),
    "mistral": dict(WIDE, **WINDOW),
    "gemma2": dict(
        WIDE,
        **WINDOW,
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": dict(
        WIDE,
        **WINDOW,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=24,
    ),
    "gpt_neox": small("intermediate_size max_position_embeddings", **NARROW, rotary_pct=0.25),
    "phi3": dict(WIDE, **WINDOW, pad_token_id=None, original_max_position_embeddings=CONTEXT),
    "opt": small("ffn_dim word_embed_proj_dim max_position_embeddings", **NARROW),
    "stablelm": dict(WIDE, partial_rotary_factor=0.25, use_qkv_bias=True, qk_layernorm=True),
    "nemotron": dict(WIDE),
    "nanochat": dict(WIDE, pad_token_id=None, final_logit_softcapping=3.0),
    "mixtral": dict(WIDE, **LOCAL_EXPERTS),
    "qwen3_moe": dict(WIDE, head_dim=24, **EXPERTS),
    "gpt_oss": dict(
        WIDE,
        **WINDOW,
        **LOCAL_EXPERTS,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": dict(
        small(
            "q_lora_rank kv_lora_rank qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
            "n_group topk_group first_k_dense_replace moe_intermediate_size",
            **WIDE | dict(num_key_value_heads=4),
        ),
        qk_nope_head_dim=16,
    ),
}
UNFIT: dict[str, dict[str, Any]] = {
    "bloom": small("hidden_size n_layer n_head"),
    "gptj": small("n_embd n_layer n_head n_positions", rotary_dim=8),
    "falcon": NARROW,
    "diffllama": dict(WIDE),
}

TEXT = """A relay is run in legs. The first runner sets off alone, reads the whole course and hands
the baton over without slowing down; the second runner takes it and runs on, step by step. Who drops
it starts again; who passes it well is never seen to have passed it at all: 0 1 2 3 4 5 6 7 8 9."""


def random_model(config: Any, seed: int = 0, *, attention: str | None = None) -> PreTrainedModel:
    """A model of this config in fp32 on the CPU. No weight is 0 or 1: what is left out shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def make_model(family: str, seed: int = 0, *, attention: str = NAME) -> PreTrainedModel:
    """A random model of this family, ready for the engine."""
    shape = FAMILIES.get(family) or UNFIT[family]
    config = AutoConfig.for_model(family, **COMMON | shape)
    return prepare(random_model(config, seed, attention=attention))


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text, a few merges, <|end|> as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """config.json, generation_config.json, model.safetensors and tokenizer.json of such a model."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=END, bos_token_id=END)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def save_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a random model of this family."""
    return save_model(make_model(family, seed, attention="eager"), folder)
