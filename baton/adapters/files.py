"""AdapterFiles: the folder of one adapter, checked before a model is loaded, and the hash of its content.

--lora sql=adapters/sql    adapter_config.json, adapter_model.safetensors      as peft writes them
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from baton.adapters.config import LARGEST_RANK, LoraSpec, read_spec
from baton.adapters.identity import MOST, Adapter
from baton.checkpoints.jsonfile import read_object, reason
from baton.checkpoints.weights import header_of
from baton.errors import InputError, ModelError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LONGEST_NAME = 256
DIGEST = 32  # hexadecimal digits
PREFIX = "base_model.model."
"""Names of an adapter's tensors begin so, then the linear's name in the model."""
A, B, COPY = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
EMBEDDINGS = (".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One adapter on this machine."""

    adapter: Adapter
    weights: Path
    spec: LoraSpec
    linears: tuple[str, ...]  # names in the model, sorted
    copies: tuple[
        str, ...
    ]  # tensors that peft copied from the model; they must be equal to its own


def split_lora(given: str) -> tuple[str, str]:
    """NAME=FOLDER as its two parts. Raises InputError."""
    name, equals, folder = given.partition("=")
    if not equals or not folder or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InputError(
            f"--lora must be NAME=FOLDER, with a name of 1 to {LONGEST_NAME} printable characters, got "
            f"{given[:200]!r}"
        )
    return name, folder


def absolute_lora(given: str) -> str:
    """NAME=FOLDER for a process in another working folder. Raises InputError."""
    name, folder = split_lora(given)
    try:
        return f"{name}={Path(folder).expanduser().absolute()}"
    except (OSError, RuntimeError) as error:  # ~nobody
        raise InputError(f"--lora {given[:200]!r} names no folder: {reason(error)}") from error


def refuse_ranks(ranks: int, flag: str = "--lora") -> None:
    """InputError for adapters of a worker of several ranks. `flag`: the option that asks for them."""
    if ranks > 1:
        raise InputError(
            f"{flag} does not work with --tensor-parallel-size {ranks}: the matrices of an adapter are "
            "not divided among ranks; leave one of the two out"
        )


def resolve_adapters(given: Sequence[str], model: str) -> tuple[AdapterFiles, ...]:
    """The adapters of --lora options, sorted by name. InputError for a name that two things have,
    ModelError for a folder that cannot be served."""
    named = [split_lora(each) for each in given]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--lora {twice} is given twice: give each adapter a name of its own")
    if model in names:
        raise InputError(f"--lora {model} has the model's own name: give the adapter another one")
    if len(named) > MOST:
        raise InputError(f"--lora is given {len(named):,} times: at most {MOST:,} adapters")
    return tuple(read_adapter(name, Path(folder).expanduser()) for name, folder in sorted(named))


def read_adapter(name: str, folder: Path) -> AdapterFiles:
    """The adapter in a folder, without its numbers. Raises ModelError."""
    try:
        if not folder.is_dir():
            raise ModelError(
                f"adapter {name}: {folder} is not a folder; it must hold {CONFIG} and {WEIGHTS}"
            )
        weights = folder / WEIGHTS
        if not weights.is_file() and (folder / PICKLED).is_file():
            raise ModelError(
                f"adapter {name}: {folder} holds {PICKLED}, a pickle, which may run any code when it is "
                "read; save the adapter with safe_serialization=True"
            )
        spec = read_spec(name, read_object(folder / CONFIG, f"{folder} is not an adapter's folder"))
        if not weights.is_file():
            raise ModelError(f"adapter {name}: {folder} lacks {WEIGHTS}; save the adapter again")
        header = json.loads(header_of(weights))
        with weights.open("rb") as file:
            digest = _digest(spec, iter(lambda: file.read(1 << 22), b""))
    except OSError as error:
        raise ModelError(f"adapter {name}: {folder} cannot be read: {reason(error)}") from error
    shapes = {key: about["shape"] for key, about in header.items() if key != "__metadata__"}
    linears, copies = _linears(name, shapes)
    _check_ranks(name, spec, linears, shapes)
    return AdapterFiles(Adapter(name, digest), weights, spec, linears, copies)


def read_weights(files: AdapterFiles) -> bytes:
    """The content of the adapter's file, read once: what is loaded from it is what the digest names.
    ModelError if it is not what it was. Raises OSError."""
    content = files.weights.read_bytes()
    if _digest(files.spec, (content,)) != files.adapter.digest:
        raise ModelError(
            f"adapter {files.adapter.name}: {files.weights} was changed while it was loaded; start again"
        )
    return content


def _digest(spec: LoraSpec, content: Iterable[bytes]) -> str:
    """Of all that an adapter computes with."""
    found = hashlib.sha256(json.dumps(astuple(spec)).encode())
    for part in content:
        found.update(part)
    return found.hexdigest()[:DIGEST]


def _linears(name: str, keys: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Linears with both of their matrices, and copies of the model's tensors. ModelError for all else."""
    halves: dict[str, set[str]] = {}
    copies = []
    for key in sorted(keys):
        if not key.startswith(PREFIX):
            raise ModelError(
                f"adapter {name} cannot be served: its tensor {key[:200]!r} has no name that peft gives; "
                "save it with peft"
            )
        if key.endswith((A, B)):
            halves.setdefault(key[len(PREFIX) : -len(A)], set()).add(key[-len(A) :])
        elif key.endswith(EMBEDDINGS):
            raise ModelError(
                f"adapter {name} cannot be served: it changes an embedding ({key[len(PREFIX) :][:200]}), "
                "and only linears can be; train it without, or merge it into the model"
            )
        else:
            copies.append(key)
    if not halves:
        raise ModelError(f"adapter {name} changes nothing: its file holds no lora_A and lora_B")
    if half := next((each for each, found in halves.items() if len(found) < 2), None):
        raise ModelError(
            f"adapter {name} is incomplete: of {half[:200]} it has one matrix and lacks the other; "
            "save it again"
        )
    return tuple(sorted(halves)), tuple(copies)


def _check_ranks(
    name: str, spec: LoraSpec, linears: Iterable[str], shapes: dict[str, list[int]]
) -> None:
    """ModelError unless each pair of matrices has the rank that the configuration says."""
    for linear in linears:
        a, b = shapes[f"{PREFIX}{linear}{A}"], shapes[f"{PREFIX}{linear}{B}"]
        rank = spec.share(linear).rank
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank <= LARGEST_RANK:
            raise ModelError(
                f"adapter {name} does not match its {CONFIG}: {linear} has lora_A {a} and lora_B {b}, "
                f"and its rank there is {rank}; save it again"
            )
