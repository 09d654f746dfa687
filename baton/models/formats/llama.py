"""LLaMA's own checkpoints: consolidated.NN.pth, params.json and tokenizer.model.

Several files are the parts of one model, cut for as many GPUs: put side by side they are whole again.
The original code rotates neighbouring numbers of a head, transformers' the two halves of it, so the
rows of wq and wk change places. What params.json does not say, and how it is filled in, is a note.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.errors import ModelError
from baton.models.formats.checkpoint import (
    Checkpoint,
    Json,
    Load,
    Tensors,
    check_names,
    check_shape,
    widest,
)
from baton.models.formats.llama_shape import Shape, read_shape
from baton.models.formats.llama_vocabulary import LlamaVocabulary, read_vocabulary

PART = re.compile(r"consolidated\.(\d\d)\.pth")
UNREAD = "rope.freqs"  # a table in LLaMA 1's and 2's files that the original code makes anew, too
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
class Parts:
    """The files of one model, in order."""

    paths: tuple[Path, ...]
    tensors: tuple[Tensors, ...]
    rows: int  # of the whole vocabulary

    def whole(self, name: str, shape: Shape) -> torch.Tensor:
        """The tensor, put together. ModelError if a part of it does not have the right shape."""
        wanted = shape.of(name, self.rows)
        cut = self._cut(name, shape)
        part = list(wanted)
        if cut is not None:
            part[cut] //= len(self.paths)
            if part[cut] * len(self.paths) != wanted[cut]:
                raise ModelError(
                    f"{self.paths[0].parent}: {name} is {list(wanted)} by params.json, which "
                    f"{len(self.paths)} files cannot share"
                )
        for path, tensors in zip(self.paths, self.tensors, strict=True):
            check_shape(name, tensors[name], tuple(part), path)
        each = [tensors[name] for tensors in self.tensors]
        if cut is None:
            for path, other in zip(self.paths, each, strict=True):
                if not torch.equal(other, each[0]):
                    raise ModelError(
                        f"{path}: {name} is not that of {self.paths[0].name}: they are parts of "
                        "different models"
                    )
        if cut is None or len(each) == 1:
            return each[0]
        return torch.cat(each, dim=cut)

    def _cut(self, name: str, shape: Shape) -> int | None:
        """Along which dimension the files share a tensor; None if each has all of it."""
        if name.endswith("norm.weight"):
            return None
        if name.startswith("tok_embeddings"):  # columns up to LLaMA 2, rows from LLaMA 3
            return 0 if self.tensors[0][name].shape[1:] == (shape.width,) else 1
        return int(name.removesuffix(".weight").endswith(CUT_ALONG_COLUMNS))


def is_llama(folder: Path) -> bool:
    """Whether the folder looks like one of Meta's. A config.json makes it one of Hugging Face's."""
    params = (folder / "params.json").is_file()
    parts = any(PART.fullmatch(path.name) for path in folder.iterdir())
    foreign = (folder / "config.json").is_file()
    return (params and parts) or ((params or parts) and not foreign)


def read_llama(folder: Path, load: Load, tokenizer: Path | None) -> Checkpoint:
    """The checkpoint in the folder. ModelError names what cannot be told in transformers' terms."""
    shape = read_shape(folder / "params.json")
    parts = _parts(folder, load, shape)
    vocabulary = read_vocabulary(folder, tokenizer, parts.rows, new_names=shape.scaled_rope)
    embedding, output = (
        parts.whole(f"{each}.weight", shape) for each in ("tok_embeddings", "output")
    )
    tied = torch.equal(embedding, output)
    config, notes = _config(shape, parts, vocabulary, tied=tied)
    return Checkpoint(
        about=f"LLaMA, {len(parts.paths)} file{'s' if len(parts.paths) > 1 else ''}",
        config=config,
        generation_config={"bos_token_id": vocabulary.bos, "eos_token_id": list(vocabulary.ends)},
        tensors=_renamed(parts, shape, tied=tied),
        vocabulary=vocabulary.vocabulary,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": vocabulary.bos_text,
            "eos_token": vocabulary.end_texts[0],
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
        chat_template=None,
        notes=(*vocabulary.notes, *notes),
    )


def _parts(folder: Path, load: Load, shape: Shape) -> Parts:
    numbered = {
        int(found[1]): path for path in folder.iterdir() if (found := PART.fullmatch(path.name))
    }
    if not numbered:
        raise ModelError(f"{folder} has params.json, but no consolidated.00.pth")
    if missing := sorted(set(range(max(numbered) + 1)) - set(numbered)):
        raise ModelError(f"{folder} lacks consolidated.{missing[0]:02d}.pth")
    paths = tuple(numbered[each] for each in sorted(numbered))
    tensors = tuple(load(path) for path in paths)
    for path, each in zip(paths, tensors, strict=True):
        if shape.layers > len(each):
            raise ModelError(f"{path} does not hold the {shape.layers:,} layers that n_layers says")
        names = [
            *OUTER,
            *(f"layers.{n}.{own}.weight" for n in range(shape.layers) for own in INNER),
        ]
        check_names(each, names, path)
        if unknown := sorted(set(each) - set(names) - {UNREAD}):
            raise ModelError(
                f"{path} has {', '.join(unknown[:3])}, which params.json does not account for: it is "
                "of another architecture"
            )
    rows = next(iter(tensors[0]["output.weight"].shape), 0) * len(paths)
    if shape.rows not in (None, rows):
        raise ModelError(
            f"{folder} has {rows:,} rows of tokens, and params.json says {shape.rows:,}"
        )
    return Parts(paths, tensors, rows)


def _renamed(parts: Parts, shape: Shape, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for ours, theirs in OUTER.items():
        if not (tied and theirs == "lm_head.weight"):
            yield theirs, parts.whole(ours, shape)
    for layer in range(shape.layers):
        for ours, theirs in INNER.items():
            tensor = parts.whole(f"layers.{layer}.{ours}.weight", shape)
            if ours in ("attention.wq", "attention.wk"):
                tensor = halves_apart(tensor, shape.width // shape.heads)
            yield f"model.layers.{layer}.{theirs}.weight", tensor


def _config(
    shape: Shape, parts: Parts, vocabulary: LlamaVocabulary, *, tied: bool
) -> tuple[Json, list[str]]:
    """config.json, and what in it was not read but concluded."""
    theta, version = _version(shape, parts, vocabulary)
    notes = [
        f"note: params.json does not say the longest context: {CONTEXTS[version]:,} tokens were put "
        f"down, as in {version}; if that is wrong, change max_position_embeddings in config.json",
        "note: nor does it say whether the model was trained to chat, so there is no chat template: "
        "give one to serve with --chat-template FILE",
    ]
    rope: Json = {"rope_type": "default", "rope_theta": theta}
    if shape.scaled_rope:
        factor = 32.0 if tied else 8.0
        rope = SCALED_ROPE | {"rope_theta": theta, "factor": factor}
        if tied:
            notes.append(
                "note: embeddings are shared with the output, as in LLaMA 3.2 alone, so the rope's "
                "factor is Meta's for 3.2, 32, and not 8"
            )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": parts.rows,
        "hidden_size": shape.width,
        "intermediate_size": shape.inside,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": CONTEXTS[version],
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": list(vocabulary.ends),
        "pad_token_id": None,
        "dtype": widest(each for name, each in parts.tensors[0].items() if name != UNREAD),
    }
    return config, notes


def _version(shape: Shape, parts: Parts, vocabulary: LlamaVocabulary) -> tuple[float, str]:
    """The rope's base, and the version of LLaMA by which the context is known."""
    if shape.theta is None:  # LLaMA 1 and 2 had no such field, and 10,000 in their code
        if vocabulary.tiktoken or shape.scaled_rope:
            raise ModelError(f"{parts.paths[0].parent / 'params.json'} does not say rope_theta")
        return 10000.0, "LLaMA 1" if shape.eps < 5e-6 else "LLaMA 2"
    if shape.scaled_rope:
        return shape.theta, "LLaMA 3.1"
    if vocabulary.tiktoken or shape.theta == 500000:
        return shape.theta, "LLaMA 3"
    if shape.theta > 10000:
        return shape.theta, "Code Llama"
    return shape.theta, "LLaMA 1" if shape.eps < 5e-6 else "LLaMA 2"


def halves_apart(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Rows 0 1 2 3 4 5 of each head become 0 2 4 1 3 5: what was a pair is half a head apart."""
    heads = weight.reshape(-1, head, weight.shape[-1])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)
