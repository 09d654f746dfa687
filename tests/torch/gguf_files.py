"""Tiny GGUF files, written as llama.cpp's converter writes them, and transformers' reading of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from gguf.constants import GGML_QUANT_SIZES
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.torch.families import make_tokenizer

Kind = GGMLQuantizationType
MIXED = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16)
CONTEXT = 128
WIDE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
)
GEMMA = dict(WIDE, head_dim=16)
SHAPES: dict[str, dict[str, Any]] = {  # by llama.cpp's name, with transformers' settings
    "llama": dict(WIDE, model_type="llama", rope_theta=50000.0),
    "qwen2": dict(WIDE, model_type="qwen2"),
    "qwen3": dict(WIDE, model_type="qwen3", head_dim=128),  # transformers' default: it does not look
    "gemma": dict(GEMMA, model_type="gemma"),
    "gemma2": dict(GEMMA, model_type="gemma2", sliding_window=8),
    "gemma3": dict(
        GEMMA, model_type="gemma3_text", sliding_window=8, num_hidden_layers=6, rms_norm_eps=1e-5
    ),
}  # fmt: skip
UNREAD_BY_TRANSFORMERS = {"gemma"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ONCE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@dataclass
class Written:
    """What differs from a plain file in F32."""

    kinds: Sequence[Kind] = (Kind.F32,)  # of the matrices, in turn
    values: Mapping[str, Any] = field(default_factory=dict)  # replaced; None: left out
    tensors: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)  # added
    settings: Mapping[str, Any] = field(default_factory=dict)
    shift: int = 0


def make_original(arch: str, **settings: Any) -> PreTrainedModel:
    """The model that the file is written from. No weight is 0 or 1: what is left out shows."""
    shape = SHAPES[arch] | settings
    config = AutoConfig.for_model(
        **dict(vocab_size=320, initializer_range=0.1, bos_token_id=0, eos_token_id=0) | shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight), alpha=0.2)
    return model.eval()


def write_gguf(path: Path, arch: str, how: Written | None = None) -> PreTrainedModel:
    """The file. Returns the model whose weights it holds, before they are rounded."""
    how = how or Written()
    model = make_original(arch, **how.settings)
    config = model.config
    writer = GGUFWriter(path, arch)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters
    theta = theta.get("full_attention", theta)["rope_theta"]
    values: dict[str, Any] = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(theta),
    }
    if arch in ("gemma2", "gemma3"):
        values[f"{arch}.attention.sliding_window"] = config.sliding_window
    if arch == "gemma2":
        values[f"{arch}.attn_logit_softcapping"] = config.attn_logit_softcapping
        values[f"{arch}.final_logit_softcapping"] = config.final_logit_softcapping
    values |= byte_level_values(make_tokenizer())
    for key, value in (values | dict(how.values)).items():
        add_value(writer, key, value)
    for number, (name, weight) in enumerate(written_tensors(model, arch).items()):
        kind = how.kinds[(number + how.shift) % len(how.kinds)] if weight.ndim > 1 else Kind.F32
        add_tensor(writer, name, weight, kind)
    for name, weight in how.tensors.items():
        add_tensor(writer, name, weight, Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def written_tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray[Any, Any]]:
    """By llama.cpp's names, changed as its converter changes them."""
    found = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        numbers = weight.numpy()
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            numbers = numbers + 1
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = model.config.num_attention_heads
            if "k_proj" in name:
                heads = model.config.num_key_value_heads
            halves = numbers.reshape(heads, 2, len(numbers) // heads // 2, *numbers.shape[1:])
            numbers = halves.swapaxes(1, 2).reshape(numbers.shape)
        found[ONCE.get(name) or layer_name(name, arch)] = numbers
    return found


def layer_name(name: str, arch: str) -> str:
    _, _, number, rest = name.split(".", 3)
    own, _, ending = rest.rpartition(".")
    if own == "post_attention_layernorm":
        theirs = "post_attention_norm" if arch in ("gemma2", "gemma3") else "ffn_norm"
    else:
        theirs = LAYER[own]
    return f"blk.{number}.{theirs}.{ending}"


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def add_tensor(writer: GGUFWriter, name: str, weight: np.ndarray[Any, Any], kind: Kind) -> None:
    if kind is Kind.F32:
        writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
        return
    try:
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    except NotImplementedError:  # the package quantizes no K types
        writer.add_tensor(name, blocks(weight.shape, kind), raw_dtype=kind)


def blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray[Any, Any]:
    """Random blocks of a K type, whose scales in float16 are small."""
    weights, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(sum(shape))
    made = rng.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), dtype=np.uint8)
    places = {Kind.Q6_K: (208,)}.get(kind, (0, 2))
    for place in places:
        scale = np.full(made.shape[:-1], 4e-5, dtype=np.float16)
        made[..., place : place + 2] = scale[..., None].view(np.uint8)
    return made.reshape(*shape[:-1], -1)


def byte_level_values(tokenizer: Tokenizer, pre: str = "gpt-2") -> dict[str, Any]:
    """The values of a byte-level tokenizer. Token 0 ends a text and begins it."""
    ids = tokenizer.get_vocab()
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(ids, key=ids.__getitem__),
        "tokenizer.ggml.token_type": [3] + [1] * (len(ids) - 1),
        "tokenizer.ggml.merges": [
            each if isinstance(each, str) else " ".join(each) for each in found
        ],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": CHAT,
    }


def transformers_reading(path: Path) -> PreTrainedModel:
    """What `from_pretrained(folder, gguf_file=name)` gives, which needs accelerate for no reason here."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()
