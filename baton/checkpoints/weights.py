"""The weights of a model folder: which safetensors files it has, checked by their headers alone.

Found as transformers finds them: the file that config.json names as transformers_weights, else
model.safetensors, else the files of model.safetensors.index.json, which may lie in folders inside.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from baton.checkpoints.jsonfile import Json, head_of, read_object, reason, what_it_is
from baton.errors import ModelError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED = "transformers_weights"
NARROW = ("F8_", "F6_", "F4")
"""Dtypes of quantized numbers begin so. They are nothing without their scales."""
PACKED = ("weight", "weight_packed", "qzeros", "_blocks", "_packed")
"""Names of tensors with integers for weights end so; others are masks and counters."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""Names of the matrix with a row for each token end so."""
EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a weight of one expert that lies apart from the others."""
LARGEST_HEADER = 100_000_000  # as in the safetensors library


def weight_files(folder: Path, config: Json) -> list[Path]:
    """The files, in order; empty if there are none. ModelError for one that is named and missing."""
    named = config.get(NAMED)
    if named is not None:
        if not isinstance(named, str) or not _inside(named):
            raise ModelError(f"{folder}: {NAMED} in config.json must name a file in that folder")
        if named.endswith(".index.json"):
            return shard_files(folder / named)
        return [_file(folder / named, "which config.json names")]
    if (folder / WHOLE).is_file():  # an index beside it is a left-over, and transformers ignores it
        return [folder / WHOLE]
    if (folder / INDEX).exists():
        return shard_files(folder / INDEX)
    if (folder / WHOLE).exists() or (folder / WHOLE).is_symlink():
        return [_file(folder / WHOLE, "which holds the weights")]
    return []


def shard_files(index: Path) -> list[Path]:
    """The files that an index names, each once, in order. Raises ModelError."""
    folder = index.parent
    shards = read_object(index, f"{folder} is incomplete").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index} has no weight_map")
    names = sorted({str(name) for name in shards.values()})
    if outside := [name for name in names if not _inside(name)]:
        raise ModelError(f"{index} names {outside[0][:80]!r}, which is not a file in its folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{folder} is incomplete: it lacks {', '.join(missing[:3])}{more}, which {index.name} "
            "names: fetch the model again"
        )
    return [folder / name for name in names]


def _inside(name: str) -> bool:
    """Whether this is a relative path that does not lead out of its folder."""
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _file(path: Path, what: str) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError(f"{path}, {what}, is a folder and must be a file: fetch the model again")
    if path.is_symlink():
        raise ModelError(f"{path} is a link to {path.readlink()}, which is not there")
    raise ModelError(f"{path}, {what}, is missing: fetch the model again")


def header_of(path: Path) -> bytes:
    """The file's header, after a check that its tensors lie inside the file. Raises ModelError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fits = 8 + length <= size and length <= LARGEST_HEADER
            header = file.read(length) if fits else b""
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}") from error
    needed = 8 + length + max((end for _, end in _tensors(path, header)), default=0)
    if needed != size:
        raise ModelError(f"{path} is {size} bytes, its header says {needed}: fetch it again")
    return header


def tensors_of(header: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by its name, of a header that was checked."""
    return {
        name: (str(about.get("dtype")), tuple(int(each) for each in about["shape"]))
        for name, about in json.loads(header).items()
        if name != "__metadata__"
    }


def holds_quantized(header: bytes) -> bool:
    """Whether a file with this header, which was checked, has tensors that are nothing without scales."""
    return any(is_quantized(name, dtype) for name, (dtype, _) in tensors_of(header).items())


def refuse_quantized(name: str, header: bytes) -> None:
    """ModelError for quantized weights, by the dtypes in a file's header: config.json may say nothing
    of them, and transformers would take the numbers without their scales."""
    for tensor, about in json.loads(header).items():
        dtype = str(about.get("dtype", "")) if tensor != "__metadata__" else ""
        if is_quantized(tensor, dtype):
            raise ModelError(
                f"{name} is quantized ({tensor} holds {dtype}), though its config.json does not say so: "
                "use the same model in bf16, fp16 or fp32"
            )


def is_quantized(tensor: str, dtype: str) -> bool:
    """Whether a tensor of this name and dtype holds numbers that are nothing without scales."""
    return dtype.startswith(NARROW) or (dtype[:1] in ("I", "U") and tensor.endswith(PACKED))


def check_vocabulary(name: str, header: bytes, vocabulary: int) -> None:
    """ModelError if a file's header has an embedding of another number of tokens. Loading tells, too, but
    by then a prompt may have been refused, for ids outside of the vocabulary."""
    for tensor, about in json.loads(header).items():
        if tensor.endswith(EMBEDDINGS) and list(about["shape"])[:1] != [vocabulary]:
            raise ModelError(
                f"{name} does not match its config.json: {tensor} is {about['shape']} in the checkpoint, "
                f"and vocab_size is {vocabulary:,}; fetch both again from one place"
            )


def count_weights(files: Iterable[Path]) -> int:
    """How many numbers the files hold. Raises ModelError."""
    return sum(numbers for path in files for numbers, _ in _tensors(path, header_of(path)))


def _tensors(path: Path, header: bytes) -> list[tuple[int, int]]:
    """Of each tensor: how many numbers it has, and where it ends. ModelError if this is no header."""
    try:
        found: dict[str, Any] = json.loads(header)
        tensors = [each for name, each in found.items() if name != "__metadata__"]
        return [
            (math.prod(map(int, each["shape"])), int(each["data_offsets"][1])) for each in tensors
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = what_it_is(head_of(path))
        why = f"{what}, not a safetensors file" if what else "broken, or no safetensors file"
        raise ModelError(f"{path} is {why}: fetch it again") from error


def sample_of(path: Path, bytes_each: int = 2**20) -> bytes:
    """The file's beginning and end: they distinguish two trainings of one architecture."""
    with path.open("rb") as file:
        first = file.read(bytes_each)
        file.seek(max(len(first), path.stat().st_size - bytes_each))
        return first + file.read(bytes_each)
