"""Convert: a .bin, .pt or .pth checkpoint becomes safetensors. Only this module reads such files.

They are pickles, which can run code when read; `weights_only=True` rejects everything but tensors.
Checkpoints in nanochat's and LLaMA's own formats and in GGUF become models of transformers (formats/).
OUT appears when it is complete, or not at all:

    model.safetensors                    or, for a checkpoint in shards, as many files and their index
    config.json, tokenizer.json, ...     copied; a missing tokenizer.json is made from the vocabulary
                                         all are made for nanochat and LLaMA

A folder with safetensors is copied, too, if its tokenizer.json is missing or its files have other names.

Tied embeddings (one tensor under two names) are written under the name of the input embedding if
config.json ties them, else under both names.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from baton.checkpoints import kinds
from baton.checkpoints.jsonfile import Json, read_object, reason
from baton.checkpoints.vocabulary import CONVERTED, SENTENCEPIECE, made_from
from baton.checkpoints.weights import header_of, shard_files, weight_files
from baton.errors import InputError, ModelError
from baton.gguf.folder import gguf_file
from baton.model_files import resolve_model
from baton.models.formats.checkpoint import (
    Checkpoint,
    Tensors,
    write_checkpoint,
    write_weights,
)
from baton.models.formats.gguf import write_gguf
from baton.models.formats.llama import is_llama, read_llama
from baton.models.formats.nanochat import is_nanochat, read_nanochat

WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
VOCABULARIES = (*CONVERTED, *SENTENCEPIECE)
COPIED = (".json", ".txt", ".model", ".jinja", ".md")
OUTPUT_NAMES = ("lm_head", "embed_out", "output")  # of a tied pair, the name that is left out


def convert_folder(folder: Path, out: Path, tokenizer: Path | None = None) -> str:
    """Write `out` from `folder`. Returns the text to print. Raises InputError for paths, ModelError for
    contents."""
    gguf = gguf_file(folder)
    check_paths(folder if gguf is None else gguf.parent, out, tokenizer)
    foreign = _foreign(folder, tokenizer) if gguf is None else None
    tied, shards = False, list[Path]()
    read: Callable[[Path], Tensors] = _load
    if gguf is not None and tokenizer is not None:
        raise InputError(f"--tokenizer is not for GGUF: {gguf} holds its own")
    if gguf is None and foreign is None:
        config = _config(folder)
        tied = config.get("tie_word_embeddings") is True
        shards, read = _shards(folder, config)
    with appearing_whole(out) as beside:
        if gguf is not None:
            count, notes = write_gguf(gguf, beside), tuple[str, ...]()
        elif foreign is not None:
            count, notes = write_checkpoint(foreign, beside), foreign.notes
        else:
            groups = (_apart(read(shard), tied=tied) for shard in shards)
            count = write_weights(groups, beside)
            notes = tuple(copy_the_rest(folder, beside))
    what = folder if foreign is None else f"{folder} ({foreign.about})"
    first = f"{count:,} tensors of {what} are in {out}; use it with --model {out}"
    return "\n".join([first, *notes])


def _foreign(folder: Path, tokenizer: Path | None) -> Checkpoint | None:
    """A checkpoint in nanochat's or LLaMA's format; None for one of transformers."""
    try:
        if is_nanochat(folder):
            return read_nanochat(folder, _load, tokenizer)
        if is_llama(folder):
            return read_llama(folder, _load, tokenizer)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {reason(error)}") from error
    if tokenizer is not None:
        raise InputError(
            "--tokenizer is for nanochat's and LLaMA's folders only: put the tokenizer into "
            f"{folder} itself"
        )
    return None


def check_paths(folder: Path, out: Path, tokenizer: Path | None = None) -> None:
    """InputError unless `folder` is one, and `out` can become a new one beside others."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name the one that holds the checkpoint")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: name a new one")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.absolute().parent}, the folder for {out.name}, does not exist")
    if tokenizer is not None and not tokenizer.is_file():
        raise InputError(f"--tokenizer {tokenizer} is not a file")


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A new folder to write into. It becomes `out` at the end, or is removed after an error. Raises
    InputError if a file cannot be written."""
    beside = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        beside.mkdir()
        yield beside
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {reason(error)}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _config(folder: Path) -> Json:
    if not (folder / "config.json").exists():
        raise ModelError(kinds.without_config(folder, kinds.names_in(folder)))
    return read_object(folder / "config.json", f"{folder} is not a model folder")


def _shards(folder: Path, config: Json) -> tuple[list[Path], Callable[[Path], Tensors]]:
    """The checkpoint's files, in order, and what reads one of them."""
    if pickled := _pickled(folder):
        return pickled, _load
    if (named := weight_files(folder, config)) and not _makes_tokenizer(folder):
        resolve_model(str(folder.absolute()))  # raises, if it cannot be served, with the reason
        raise ModelError(
            f"there is nothing to convert in {folder}: it holds safetensors already, and can be used "
            f"with --model {folder}"
        )
    files = named or _named_otherwise(folder)
    for path in files:
        header_of(path)
    return files, load_file


def _makes_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer.json is missing that only convert can make."""
    own = any((folder / name).is_file() for name in ("tokenizer.json", *SENTENCEPIECE))
    return not own and any((folder / name).is_file() for name in CONVERTED)


def _named_otherwise(folder: Path) -> list[Path]:
    """Safetensors files under other names than transformers': one, or all shards of a lost index."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelError(
            f"there is nothing to convert in {folder}: it has no {', '.join(kinds.PICKLES)} file, and "
            "no .safetensors"
        )
    numbers = [SHARD.fullmatch(path.name) for path in found]
    shards = {(int(each[1]), int(each[2])) for each in numbers if each}
    if len(found) > 1 and shards != {(each, len(found)) for each in range(1, len(found) + 1)}:
        raise ModelError(
            f"{folder} has several safetensors files, no index, and not all shards of one model: "
            f"{', '.join(path.name for path in found[:5])}; leave one in it, or fetch the model again"
        )
    return found


def _pickled(folder: Path) -> list[Path]:
    """The files of a pickled checkpoint, in order; empty if there are none."""
    if (folder / INDEX).is_file():
        return shard_files(folder / INDEX)
    found = kinds.pickles(path.name for path in folder.iterdir())
    if WHOLE in found:
        return [folder / WHOLE]
    if len(found) > 1:
        raise ModelError(
            f"{folder} has several checkpoints and no {INDEX}: {', '.join(found)}; leave one in it"
        )
    return [folder / name for name in found]


def _load(path: Path) -> Tensors:
    """The tensors of one file, mapped rather than read where the format allows it."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except Exception as error:  # a hostile or broken pickle can raise anything
        raise ModelError(
            f"{path} is not read: it is broken, or holds more than tensors, which may be code that "
            f"runs ({reason(error, 200)})"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{path} does not hold named tensors")
    if odd := [str(name) for name, each in found.items() if not isinstance(each, torch.Tensor)]:
        raise ModelError(f"{path} holds values that are not tensors: {', '.join(odd[:5])}")
    return {str(name): each for name, each in found.items()}


def _mappable(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"  # zip; the older format cannot be mapped


def _apart(tensors: Tensors, *, tied: bool) -> Tensors:
    """Every tensor contiguous and in memory of its own, as safetensors requires."""
    by_place: dict[tuple[object, ...], list[str]] = {}
    for name, each in tensors.items():
        place = (each.data_ptr(), each.shape, each.stride(), each.dtype)
        key = place if each.numel() else (name,)
        by_place.setdefault(key, []).append(name)
    kept: Tensors = {}
    for names in by_place.values():
        inputs = [name for name in names if not name.split(".")[-2:][0].startswith(OUTPUT_NAMES)]
        for name in inputs if tied and inputs else names:
            kept[name] = tensors[name].clone(memory_format=torch.contiguous_format)
    return kept


def copy_the_rest(folder: Path, out: Path) -> list[str]:
    """Configuration and tokenizer; never Python files. Returns notes for the user."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    if (out / "tokenizer.json").is_file():
        return []
    if not any((folder / name).is_file() for name in VOCABULARIES):  # or an empty one would be made
        return [f"note: {folder} has no tokenizer.json, which serving needs, and no vocabulary"]
    if any((folder / name).is_file() for name in SENTENCEPIECE):
        made = _from_sentencepiece(folder, out / "tokenizer.json")
        if made is None:
            return ["tokenizer.json was made from the tokenizer files there"]
        if not any((folder / name).is_file() for name in CONVERTED):
            return [f"note: no tokenizer.json could be made from {folder}: {made}"]
    from transformers import AutoTokenizer  # seconds; only for folders from before tokenizer.json

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.save_pretrained(out)
    except Exception as error:  # the tokenizers library raises bare Exception
        return [f"note: no tokenizer.json could be made from {folder}: {reason(error, 200)}"]
    if (out / "tokenizer.json").is_file():
        return ["tokenizer.json was made from the tokenizer files there"]
    return [f"note: {folder} has no tokenizer.json, which serving needs, and none could be made"]


def _from_sentencepiece(folder: Path, out: Path) -> str | None:
    """Write the tokenizer.json that serving `folder` would use. Returns why it cannot be, or None."""
    source = next(folder / name for name in SENTENCEPIECE if (folder / name).is_file())
    try:
        text = json.dumps(made_from(source), ensure_ascii=False)
    except ModelError as error:
        return str(error)
    out.write_text(text, encoding="utf-8")
    return None
