"""Tiny models whose rotary frequencies depend on the length of the sequence, and what they say alone."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from baton.engine.attention import NAME
from baton.engine.loading import prepare
from tests.cluster.reference import CLEAR, Model
from tests.torch.families import END, VOCABULARY, make_tokenizer

LIMIT = 64

SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.15,
    bos_token_id=END,
    eos_token_id=END,
)
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0] * 8, long_factor=[1, 1.5, 2, 3, 4, 6, 8, 10]
)
DYNAMIC = dict(rope_type="dynamic", factor=8.0)

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", dict(max_position_embeddings=LIMIT, rope_scaling=DYNAMIC)),
    "longrope": (
        "llama",
        dict(
            max_position_embeddings=1024,
            rope_scaling=dict(LONGROPE, original_max_position_embeddings=LIMIT),
        ),
    ),
    "phi3": (
        "phi3",
        dict(
            max_position_embeddings=1024,
            original_max_position_embeddings=LIMIT,
            rope_scaling=LONGROPE,
            pad_token_id=None,
        ),
    ),
    "by layer": (
        "gemma3_text",
        dict(
            max_position_embeddings=LIMIT,
            head_dim=16,
            sliding_window=24,
            query_pre_attn_scalar=24,
            hidden_activation="gelu",
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(
                full_attention=dict(DYNAMIC, rope_theta=1e6),
                sliding_attention=dict(
                    LONGROPE, rope_theta=1e4, original_max_position_embeddings=LIMIT // 2
                ),
            ),
        ),
    ),
}


def make_rope_model(
    kind: str, *, attention: str = NAME, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model of this kind on the CPU."""
    family, settings = ROPES[kind]
    config = AutoConfig.for_model(family, **SHAPE | copy.deepcopy(settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight), alpha=0.2)
    return prepare(model.to(dtype))


def save_rope_model(kind: str, folder: Path) -> Path:
    """The folder of such a model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_rope_model(kind, attention="eager")
    model.generation_config = GenerationConfig(eos_token_id=END, bos_token_id=END)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def said_alone(model: Model, prompt: Sequence[int], length: int) -> tuple[list[int], bool]:
    """What a new model of transformers generates, and whether every token has a clear lead. A model
    that was used before would have kept frequencies."""
    fresh = replace(model, reference=copy.deepcopy(model.reference))
    said = fresh.generate(prompt, length)
    return said.tokens, said.lead > CLEAR


def clear_prompts(
    model: Model, lengths: Sequence[int], length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of these lengths, and what each says alone."""
    numbers = torch.Generator().manual_seed(5)
    prompts, answers = [], []
    for size in lengths:
        for _ in range(50):
            ids = torch.randint(1, VOCABULARY, (size,), generator=numbers).tolist()
            tokens, clear = said_alone(model, ids, length)
            if clear:
                prompts.append(ids)
                answers.append(tokens)
                break
    assert len(prompts) == len(lengths), "no prompt has a clear answer"
    return prompts, answers
