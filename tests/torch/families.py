"""Tiny random models of many families, each with what makes its family peculiar switched on.

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

WIDE = dict(  # llama and its many relatives: 2 query heads to a key head
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
)
WINDOW = dict(sliding_window=8)  # shorter than any test sequence
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=48, num_experts=4)

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_embd=64, n_head=4, n_layer=2, n_positions=CONTEXT),
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
    "gpt_neox": dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        rotary_pct=0.25,
        max_position_embeddings=CONTEXT,
    ),
    "phi3": dict(WIDE, **WINDOW, pad_token_id=None, original_max_position_embeddings=CONTEXT),
    "opt": dict(
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=CONTEXT,
    ),
    "stablelm": dict(WIDE, partial_rotary_factor=0.25, use_qkv_bias=True, qk_layernorm=True),
    "nemotron": dict(WIDE),
    "nanochat": dict(WIDE, pad_token_id=None, final_logit_softcapping=3.0),
    "mixtral": dict(WIDE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(WIDE, head_dim=24, **EXPERTS),
    "gpt_oss": dict(
        WIDE,
        **WINDOW,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": dict(
        WIDE | dict(num_key_value_heads=4),
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=48,
    ),
}
UNFIT: dict[str, dict[str, Any]] = {
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    "gptj": dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=CONTEXT),
    "falcon": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "diffllama": dict(WIDE),
}

TEXT = """A relay is run in legs. The first runner sets off alone, reads the whole course and hands
the baton over without slowing down; the second runner takes it and runs on, step by step. Who drops
it starts again; who passes it well is never seen to have passed it at all: 0 1 2 3 4 5 6 7 8 9."""


def make_model(family: str, seed: int = 0, *, attention: str = NAME) -> PreTrainedModel:
    """A model of this family in fp32 on the CPU. No weight is 0 or 1: what is left out shows."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCABULARY, initializer_range=0.1, bos_token_id=END, eos_token_id=END
    )
    shape = FAMILIES.get(family) or UNFIT[family]
    config = AutoConfig.for_model(family, **settings | shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight), alpha=0.2)
    return prepare(model)


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


def save_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """config.json, generation_config.json, model.safetensors and tokenizer.json of such a model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(family, seed, attention="eager")
    model.generation_config = GenerationConfig(eos_token_id=END, bos_token_id=END)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
