"""Checkpoint: a model from another format, told in transformers' terms, and how it is written down.

model.safetensors      or several files of about 4 GiB and their index; one file in memory at a time
config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from baton.errors import ModelError
from baton.text import Tokenizer

FILE_BYTES = 4 << 30  # a file is closed when it has grown past this

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Load = Callable[[Path], Tensors]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokenizer.json will hold, and the file it was made from."""

    json: Json
    source: Path

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        vocab = self.json["model"]["vocab"]
        return max([*vocab.values(), *self.special_ids().values()], default=-1) + 1

    def special_ids(self) -> dict[str, int]:
        """Ids of the added tokens by their text."""
        return {each["content"]: each["id"] for each in self.json["added_tokens"]}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` is gone through once, while it is written. `about` says what was read, `notes`
    what the user should know."""

    about: str
    config: Json
    generation_config: Json
    tensors: Iterable[tuple[str, torch.Tensor]]
    vocabulary: Vocabulary
    tokenizer_config: Json
    chat_template: str | None
    notes: tuple[str, ...]


def write_checkpoint(checkpoint: Checkpoint, out: Path) -> int:
    """Everything of the checkpoint into the folder `out`. Returns the number of tensors."""
    described = {
        "config.json": checkpoint.config,
        "generation_config.json": checkpoint.generation_config,
        "tokenizer_config.json": checkpoint.tokenizer_config,
        "tokenizer.json": checkpoint.vocabulary.json,
    }
    for name, content in described.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    if checkpoint.chat_template is not None:
        (out / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    try:
        Tokenizer(out / "tokenizer.json")
    except ModelError as error:
        why = str(error).partition("tokenizer.json: ")[2]
        raise ModelError(
            f"no tokenizer can be made from {checkpoint.vocabulary.source}: {why}"
        ) from error
    return write_weights(checkpoint.tensors, out)


def write_weights(tensors: Iterable[tuple[str, torch.Tensor]], out: Path) -> int:
    """The tensors into as many files as they need, with an index if these are several."""
    weight_map: dict[str, int] = {}
    total, size, held = 0, 0, Tensors()
    files = 0
    for name, tensor in tensors:
        held[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.numel() * tensor.element_size()
        weight_map[name] = files
        if size >= FILE_BYTES:
            save_file(held, out / f"{files}.part", metadata={"format": "pt"})
            total, size, held = total + size, 0, Tensors()
            files += 1
    if held:
        save_file(held, out / f"{files}.part", metadata={"format": "pt"})
        total, files = total + size, files + 1
    names = [f"model-{each + 1:05d}-of-{files:05d}.safetensors" for each in range(files)]
    if files == 1:
        names = ["model.safetensors"]
    for each, name in enumerate(names):
        (out / f"{each}.part").rename(out / name)
    if files > 1:
        where = {name: names[each] for name, each in weight_map.items()}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2)
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return len(weight_map)


def read_json(path: Path, what: str) -> Json:
    """The JSON object in a file of a checkpoint; `what` says what the file is needed for."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} lacks {path.name}, {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return found


def count(found: Json, name: str, path: Path) -> int:
    """A whole number above 0."""
    value = number(found, name, path)
    if value != int(value):
        raise ModelError(f"{path}: {name} must be a whole number, and is {value!r}")
    return int(value)


def number(found: Json, name: str, path: Path) -> float:
    """A number above 0."""
    value = found.get(name)
    if value is None:
        raise ModelError(f"{path} does not say {name}")
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{path}: {name} must be a number above 0, and is {str(value)[:80]!r}")
    return float(value) if isinstance(value, float) else value


def check_names(tensors: Iterable[str], expected: Iterable[str], path: Path) -> None:
    """Nothing is missing. What is there beside that is each format's own business."""
    missing = sorted(set(expected) - set(tensors))
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{path} lacks {', '.join(missing[:3])}{rest}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], path: Path) -> None:
    """A tensor that does not have the shape its configuration asks for is refused, and so is one
    that does not hold plain floating-point numbers."""
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{path}: {name} is {list(tensor.shape)}, where its configuration asks for {list(shape)}"
        )
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ModelError(
            f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}: only float32, "
            "float16 and bfloat16 weights are converted, quantized ones are not"
        )


def widest(tensors: Iterable[torch.Tensor]) -> str:
    """The dtype in which no weight is rounded, as config.json calls it."""
    kinds = {tensor.dtype for tensor in tensors}
    only = kinds.pop() if len(kinds) == 1 else torch.float32
    return str(only).removeprefix("torch.")


def given_vocabulary(path: Path) -> Vocabulary:
    """A tokenizer.json as it is. Whether it can be read as one is seen when it is written."""
    found = read_json(path, "the tokenizer")
    model, added = found.get("model"), found.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(isinstance(each, int) for each in vocab.values()):
        raise ModelError(f"{path} is no tokenizer.json with a vocabulary of tokens and their ids")
    sound = isinstance(added, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("id"), int)
        and isinstance(each.get("content"), str)
        for each in added
    )
    if not sound:
        raise ModelError(f"{path} is no tokenizer.json with added_tokens")
    return Vocabulary(found, path)
