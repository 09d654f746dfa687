"""Checkpoint: a model that was read from another format, ready to be written in transformers' format.

model.safetensors      or several files of about 4 GiB and their index; one file in memory at a time
config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from baton.checkpoints.jsonfile import parse_json, reason
from baton.checkpoints.tokenizer_json import Vocabulary
from baton.errors import ModelError
from baton.text import Tokenizer

FILE_BYTES = 4 << 30  # a file is closed when it has grown past this

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Load = Callable[[Path], Tensors]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder whose layers are attention and a feed-forward part."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inside: int  # width of the feed-forward part

    def check(self, path: Path) -> None:
        """Raises ModelError if the sizes, read from `path`, do not fit together."""
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise ModelError(
                f"{path}: width {self.width}, {self.heads} heads and {self.kv_heads} heads for keys "
                "do not divide into each other"
            )

    def of(self, name: str, rows: int) -> tuple[int, ...]:
        """The shape of the tensor with this name of transformers; `rows` is the vocabulary's size."""
        width, keys = self.width, self.width // self.heads * self.kv_heads
        match name.split(".")[-2]:
            case "embed_tokens" | "lm_head":
                return (rows, width)
            case "k_proj" | "v_proj":
                return (keys, width)
            case "gate_proj" | "up_proj" | "fc1":
                return (self.inside, width)
            case "down_proj" | "fc2":
                return (width, self.inside)
            case "q_proj" | "o_proj":
                return (width, width)
        return (width,)  # a norm

    def config(self, rows: int) -> Json:
        """Its part of config.json."""
        return {
            "vocab_size": rows,
            "hidden_size": self.width,
            "intermediate_size": self.inside,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "attention_bias": False,
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` is iterated once, while it is written."""

    about: str  # the format and the files that were read
    config: Json  # without token ids
    tensors: Iterable[tuple[str, torch.Tensor]]
    vocabulary: Vocabulary
    bos: str  # begins a text
    eos: str
    ends: tuple[str, ...]  # tokens that end an answer, eos among them
    chat_template: str | None
    notes: tuple[str, ...]  # what the user should know


def write_checkpoint(checkpoint: Checkpoint, out: Path) -> int:
    """Write everything into the folder `out`. Returns the number of tensors."""
    vocabulary = checkpoint.vocabulary
    special = vocabulary.special_ids()
    ends = [special[text] for text in checkpoint.ends]
    ids = {"bos_token_id": special[checkpoint.bos], "eos_token_id": ends}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": checkpoint.bos,
        "eos_token": checkpoint.eos,
        "model_max_length": checkpoint.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (
        ("config.json", checkpoint.config | ids | {"pad_token_id": None}),
        ("generation_config.json", ids),
        ("tokenizer_config.json", tokenizer_config),
        ("tokenizer.json", vocabulary.json),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    if checkpoint.chat_template is not None:
        (out / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    try:
        Tokenizer(out / "tokenizer.json")
    except ModelError as error:
        why = str(error).partition("tokenizer.json: ")[2]
        raise ModelError(f"no tokenizer can be made from {vocabulary.source}: {why}") from error
    return write_weights(by_size(checkpoint.tensors), out)


def by_size(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Tensors]:
    """Copies of the tensors, in groups of about FILE_BYTES."""
    group, size = Tensors(), 0
    for name, tensor in tensors:
        group[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        if size >= FILE_BYTES:
            yield group
            group, size = Tensors(), 0
    if group:
        yield group


def write_weights(groups: Iterable[Tensors], out: Path) -> int:
    """A file for each group, and an index if there are several. Returns the number of tensors."""
    parts: list[list[str]] = []
    size = 0
    for group in groups:
        save_file(group, out / f"{len(parts)}.part", metadata={"format": "pt"})
        parts.append(list(group))
        size += sum(tensor.nbytes for tensor in group.values())
        del group  # before the next one is made
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        if len(parts) == 1:
            file = "model.safetensors"
        (out / f"{number}.part").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2)
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return len(weight_map)


def read_json(path: Path, what: str) -> Json:
    """The JSON object in a file of a checkpoint; `what` says what the file is needed for."""
    try:
        found = parse_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path.parent} lacks {path.name}, {what}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return found


def count(found: Json, name: str, path: Path) -> int:
    """A whole number above 0."""
    value = number(found, name, path)
    if value != int(value):
        raise ModelError(f"{path}: {name} must be a whole number, got {value!r}")
    return int(value)


def number(found: Json, name: str, path: Path) -> float:
    """A number above 0."""
    value = found.get(name)
    if value is None:
        raise ModelError(f"{path} lacks {name}")
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{path}: {name} must be a number above 0, got {str(value)[:80]!r}")
    return float(value) if isinstance(value, float) else value


def transformers_names(
    tensors: Tensors,
    path: Path,
    *,
    once: Mapping[str, str],
    layer: str,
    in_layer: Mapping[str, str],
    layers: int,
) -> dict[str, str]:
    """transformers' name by the name that each tensor has in `path`: those of `once`, and those of
    `in_layer` for each layer, where they follow `layer`. Raises ModelError if one is missing."""
    if layers > len(tensors):  # first: a number from a file must not fill memory
        raise ModelError(f"{path} does not hold the {layers:,} layers of its configuration")
    names = dict(once) | {
        f"{layer}.{n}.{own}.weight": f"model.layers.{n}.{theirs}.weight"
        for n in range(layers)
        for own, theirs in in_layer.items()
    }
    missing = sorted(set(names) - set(tensors))
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{path} lacks {', '.join(missing[:3])}{rest}")
    return names


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], path: Path) -> None:
    """Raises ModelError for another shape, and for anything but floating-point numbers."""
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{path}: {name} is {list(tensor.shape)}, its configuration needs {list(shape)}"
        )
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ModelError(
            f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}: only float32, "
            "float16 and bfloat16 weights are converted, quantized ones are not"
        )


def widest(tensors: Iterable[torch.Tensor]) -> str:
    """The dtype that rounds no weight, as config.json calls it."""
    kinds = {tensor.dtype for tensor in tensors}
    only = kinds.pop() if len(kinds) == 1 else torch.float32
    return str(only).removeprefix("torch.")


def given_vocabulary(path: Path) -> Vocabulary:
    """A tokenizer.json, unchanged. Whether the tokenizers library reads it is checked on writing."""
    found = read_json(path, "the tokenizer")
    model, added = found.get("model"), found.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(isinstance(each, int) for each in vocab.values()):
        raise ModelError(
            f"{path} is not a tokenizer.json with a vocabulary of tokens and their ids"
        )
    sound = isinstance(added, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("id"), int)
        and isinstance(each.get("content"), str)
        for each in added
    )
    if not sound:
        raise ModelError(f"{path} is not a tokenizer.json with added_tokens")
    return Vocabulary(found, path)
