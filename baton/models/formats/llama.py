"""LLaMA's own checkpoints: consolidated.NN.pth, params.json and tokenizer.model.

Several files are the parts of one model, divided among as many GPUs: concatenated they are whole again.
The original code rotates neighbouring numbers of a head, transformers' code its two halves, so the
rows of wq and wk are reordered. Values that params.json lacks are filled in and reported in a note.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.checkpoints.jsonfile import Json, read_object
from baton.errors import ModelError
from baton.models.formats.checkpoint import (
    Checkpoint,
    Load,
    Shape,
    Tensors,
    check_shape,
    count,
    number,
    transformers_names,
    widest,
)
from baton.models.formats.llama_vocabulary import LlamaVocabulary, read_vocabulary

PART = re.compile(r"consolidated\.(\d\d)\.pth")
UNREAD = "rope.freqs"  # a table in LLaMA 1's and 2's files that the original code recomputes
RUN_TIME = {"max_batch_size", "max_seq_len"}  # how much memory the original program allocates
KNOWN = RUN_TIME | {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope",
}  # fmt: skip
INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CUT_ALONG_COLUMNS = ("attention.wo", "feed_forward.w2")
SCALED_ROPE = {  # of 3.1 and later; in Meta's code, not in params.json
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONTEXTS = {
    "LLaMA 3.1": 131072,
    "LLaMA 3": 8192,
    "Code Llama": 16384,
    "LLaMA 2": 4096,
    "LLaMA 1": 2048,
}


@dataclass(frozen=True, slots=True)
class Params:
    """The content of params.json."""

    shape: Shape
    eps: float
    theta: float | None
    scaled_rope: bool
    rows: int | None  # of the vocabulary; None: not given


@dataclass(frozen=True, slots=True)
class Parts:
    """The files of one model, in order."""

    paths: tuple[Path, ...]
    tensors: tuple[Tensors, ...]
    names: Mapping[str, str]  # transformers' names by LLaMA's
    shape: Shape
    rows: int  # of the whole vocabulary

    def whole(self, name: str) -> torch.Tensor:
        """The concatenated tensor. Raises ModelError if a part of it has the wrong shape."""
        wanted = self.shape.of(self.names[name], self.rows)
        cut = self._cut(name)
        part = list(wanted)
        if cut is not None:
            part[cut] //= len(self.paths)
            if part[cut] * len(self.paths) != wanted[cut]:
                raise ModelError(
                    f"{self.paths[0].parent}: {name} must be {list(wanted)} by params.json, "
                    f"which cannot be split over {len(self.paths)} files"
                )
        each = [tensors[name] for tensors in self.tensors]
        for path, tensor in zip(self.paths, each, strict=True):
            check_shape(name, tensor, tuple(part), path)
            if cut is None and not torch.equal(tensor, each[0]):
                raise ModelError(
                    f"{path}: {name} differs from that of {self.paths[0].name}: the files are parts "
                    "of different models"
                )
        return each[0] if cut is None or len(each) == 1 else torch.cat(each, dim=cut)

    def _cut(self, name: str) -> int | None:
        """The dimension along which the files divide a tensor; None if each has all of it."""
        if name.endswith("norm.weight"):
            return None
        if name.startswith("tok_embeddings"):  # columns up to LLaMA 2, rows from LLaMA 3
            return 0 if self.tensors[0][name].shape[1:] == (self.shape.width,) else 1
        return int(name.removesuffix(".weight").endswith(CUT_ALONG_COLUMNS))


def is_llama(folder: Path) -> bool:
    """Whether the folder looks like one of Meta's; one with a config.json is Hugging Face's."""
    params = (folder / "params.json").is_file()
    parts = any(PART.fullmatch(path.name) for path in folder.iterdir())
    foreign = (folder / "config.json").is_file()
    return (params and parts) or ((params or parts) and not foreign)


def read_llama(folder: Path, load: Load, tokenizer: Path | None) -> Checkpoint:
    """The checkpoint in the folder. Raises ModelError naming what transformers cannot represent."""
    params = _params(folder / "params.json")
    parts = _parts(folder, load, params)
    vocabulary = read_vocabulary(folder, tokenizer, parts.rows, new_names=params.scaled_rope)
    tied = torch.equal(parts.whole("tok_embeddings.weight"), parts.whole("output.weight"))
    config, notes = _config(params, parts, vocabulary, tied=tied)
    return Checkpoint(
        about=f"LLaMA, {len(parts.paths)} file{'s' if len(parts.paths) > 1 else ''}",
        config=config,
        tensors=_renamed(parts, tied=tied),
        vocabulary=vocabulary.vocabulary,
        bos=vocabulary.bos,
        eos=vocabulary.ends[0],
        ends=vocabulary.ends,
        chat_template=None,
        notes=(*vocabulary.notes, *notes),
    )


def _params(path: Path) -> Params:
    params = read_object(path, f"{path.parent} does not say the model's shape")
    if unknown := sorted(set(params) - KNOWN):
        raise ModelError(
            f"{path} has {', '.join(unknown)[:200]}, which is not known here: only LLaMA 1, 2, 3, "
            "3.1, 3.2 (text) and 3.3 are converted, not quantized"
        )
    width, layers, heads, multiple = (
        count(params, name, path) for name in ("dim", "n_layers", "n_heads", "multiple_of")
    )
    kv_heads = heads if params.get("n_kv_heads") is None else count(params, "n_kv_heads", path)
    inside = 8 * width // 3
    if params.get("ffn_dim_multiplier") is not None:
        inside = int(number(params, "ffn_dim_multiplier", path) * inside)
    shape = Shape(width, layers, heads, kv_heads, -(-inside // multiple) * multiple)
    shape.check(path)
    theta = None if params.get("rope_theta") is None else number(params, "rope_theta", path)
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ModelError(f"{path}: use_scaled_rope must be true or false, got {scaled!r}")
    rows = params.get("vocab_size", -1)  # -1: as many as the tokenizer has
    rows = None if rows == -1 else count(params, "vocab_size", path)
    return Params(shape, number(params, "norm_eps", path), theta, scaled, rows)


def _parts(folder: Path, load: Load, params: Params) -> Parts:
    numbered = {
        int(found[1]): path for path in folder.iterdir() if (found := PART.fullmatch(path.name))
    }
    if not numbered:
        raise ModelError(f"{folder} has params.json, but no consolidated.00.pth")
    if missing := sorted(set(range(max(numbered) + 1)) - set(numbered)):
        raise ModelError(f"{folder} lacks consolidated.{missing[0]:02d}.pth")
    paths = tuple(numbered[each] for each in sorted(numbered))
    tensors = tuple(load(path) for path in paths)
    names: dict[str, str] = {}
    for path, each in zip(paths, tensors, strict=True):
        layers = params.shape.layers
        names = transformers_names(
            each, path, once=OUTER, layer="layers", in_layer=INNER, layers=layers
        )
        if unknown := sorted(set(each) - set(names) - {UNREAD}):
            raise ModelError(
                f"{path} has {', '.join(unknown[:3])}, which params.json does not account for: it is "
                "of another architecture"
            )
    rows = next(iter(tensors[0]["output.weight"].shape), 0) * len(paths)
    if params.rows not in (None, rows):
        raise ModelError(
            f"{folder} has {rows:,} rows of tokens, and params.json says {params.rows:,}"
        )
    return Parts(paths, tensors, names, params.shape, rows)


def _renamed(parts: Parts, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for ours, theirs in parts.names.items():
        if tied and theirs == "lm_head.weight":
            continue
        tensor = parts.whole(ours)
        if ours.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = halves_apart(tensor, parts.shape.width // parts.shape.heads)
        yield theirs, tensor


def _config(
    params: Params, parts: Parts, vocabulary: LlamaVocabulary, *, tied: bool
) -> tuple[Json, list[str]]:
    """config.json, and notes on values that params.json lacks."""
    theta, version = _version(params, parts, vocabulary)
    notes = [
        f"note: params.json lacks the context length: {CONTEXTS[version]:,} tokens are assumed, as in "
        f"{version}; if that is wrong, change max_position_embeddings in config.json",
        "note: there is no chat template, because params.json does not say whether the model was trained "
        "to chat: give one to serve with --chat-template FILE",
    ]
    rope: Json = {"rope_type": "default", "rope_theta": theta}
    if params.scaled_rope:
        rope = SCALED_ROPE | {"rope_theta": theta, "factor": 32.0 if tied else 8.0}
        if tied:
            notes.append(
                "note: embeddings are shared with the output, as in LLaMA 3.2 alone, so the rope's "
                "factor is Meta's for 3.2, 32, and not 8"
            )
    config = params.shape.config(parts.rows) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": CONTEXTS[version],
        "hidden_act": "silu",
        "rms_norm_eps": params.eps,
        "rope_parameters": rope,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": widest(each for name, each in parts.tensors[0].items() if name != UNREAD),
    }
    return config, notes


def _version(params: Params, parts: Parts, vocabulary: LlamaVocabulary) -> tuple[float, str]:
    """The rope's base, and the version of LLaMA, which gives the context."""
    oldest = "LLaMA 1" if params.eps < 5e-6 else "LLaMA 2"
    if params.theta is None:  # LLaMA 1 and 2 had no such field, and 10,000 in their code
        if vocabulary.tiktoken or params.scaled_rope:
            raise ModelError(f"{parts.paths[0].parent / 'params.json'} lacks rope_theta")
        return 10000.0, oldest
    if params.scaled_rope:
        return params.theta, "LLaMA 3.1"
    if vocabulary.tiktoken or params.theta == 500000:
        return params.theta, "LLaMA 3"
    return params.theta, "Code Llama" if params.theta > 10000 else oldest


def halves_apart(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Rows 0 1 2 3 4 5 of each head become 0 2 4 1 3 5: the two of a pair are half a head apart."""
    heads = weight.reshape(-1, head, weight.shape[-1])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)
