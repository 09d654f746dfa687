"""Quantize: a model with 4 or 8 bits for each weight, rounded to the nearest, without data.

Written as compressed-tensors' pack-quantized format: symmetric, a scale for each row and group of
columns. OUT appears when it is complete and can be served, or not at all:

    model.safetensors               or several files of about 4 GiB and their index
    config.json, tokenizer.json...  copied; config.json says how the weights are stored

    scale = largest of the group / (half of the integers' range)        value = round(weight / scale)

What decides more than its size says keeps its width: embeddings, the output, and what chooses experts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from baton.checkpoints.jsonfile import Json, read_object, write_json
from baton.checkpoints.weights import EXPERT, NAMED, header_of, tensors_of
from baton.engine.loading import shape_of
from baton.errors import InputError, ModelError
from baton.gguf.config import describe
from baton.gguf.header import SIZES, read_header
from baton.gguf.weights import PLAIN, gguf_weights
from baton.model_files import ModelFiles, resolve_model
from baton.models.convert import appearing_whole, check_paths, copy_the_rest
from baton.models.formats.checkpoint import by_size, write_weights

GROUPS = (128, 64, 32, 16, 8)
WORD = 32  # bits
CHOOSES = frozenset(("gate", "router", "router_gate", "wg", "shared_expert_gate"))
"""Modules that choose experts, or weigh a whole one: they themselves, and what is in them."""
FULL = ("F32", "F16", "BF16")
WHOLE_ROW = -1
Named = tuple[str, torch.Tensor]


@dataclass
class Measured:
    """What was written so far."""

    matrices: int = 0
    squares: float = 0.0
    errors: float = 0.0  # squares of the differences

    def add(self, weight: torch.Tensor, found: torch.Tensor) -> None:
        self.matrices += 1
        self.squares += float(weight.square().sum(dtype=torch.float64))
        self.errors += float((found - weight).square().sum(dtype=torch.float64))

    @property
    def share(self) -> float:
        """The error relative to the weights, both as root mean squares."""
        return (self.errors / self.squares) ** 0.5 if self.squares else 0.0


def quantize_model(name: str, out: Path, bits: int, group: int | None) -> str:
    """Write the model `name` into the folder `out`. `group`: columns that share a scale, -1 for all;
    None: the largest of GROUPS that fits. Returns the text to print. Raises InputError, ModelError."""
    if group is not None and group != WHOLE_ROW and group < 1:
        raise InputError(f"--group-size must be a number of columns or -1, got {group}")
    files = resolve_model(name)
    if files.folder is None:
        raise InputError(f"{name} has no weights to quantize: they are made up when it is loaded")
    if files.quantized is not None:
        raise InputError(
            f"{name} is quantized already ({files.quantized.about}): name the model that it was made from"
        )
    check_paths(files.folder, out)
    shape = shape_of(files)
    chosen = _chosen(shape, _shapes(files))
    if not chosen:
        raise ModelError(f"{name} has no matrices that can be quantized: it is small as it is")
    size = _group(name, chosen, group)
    measured = Measured()
    with appearing_whole(out) as beside:
        stored = _stored(_weights(files), chosen, bits, size, measured)
        write_weights(by_size(stored), beside)
        notes = copy_the_rest(files.folder, beside)
        ignored = _ignored(shape, chosen)
        conv1d = any(isinstance(each, Conv1D) for _, each in _products(shape))
        _tell(beside / "config.json", settings(bits, size, ignored, conv1d=conv1d))
        resolve_model(str(beside.absolute()))
    return "\n".join([_said(files, out, bits, size, measured), *notes])


def _said(files: ModelFiles, out: Path, bits: int, size: int, measured: Measured) -> str:
    before = sum(path.stat().st_size for path in files.weights or [files.gguf] if path)
    after = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    groups = "a scale for each row" if size == WHOLE_ROW else f"groups of {size}"
    return (
        f"{measured.matrices:,} matrices of {files.name} are in {out} with {bits} bits ({groups}; "
        f"{measured.share:.2%} off): {after / 1e6:,.1f} MB, from {before / 1e6:,.1f} MB; use it with "
        f"--model {out}"
    )


def _shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """The shapes of the checkpoint's tensors of floating-point numbers."""
    if files.gguf is not None:
        described = describe(read_header(files.gguf))
        return {each.name: tuple(each.tensor.shape) for each in described.weights}
    return {
        name: shape
        for path in files.weights
        for name, (dtype, shape) in tensors_of(header_of(path)).items()
        if dtype in FULL
    }


def _chosen(
    shape: PreTrainedModel, found: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The matrices to quantize. `shape`: the model without memory."""
    prefix = f"{shape.base_model_prefix}."
    output = shape.get_output_embeddings()
    linear = {f"{name}.weight" for name, each in _products(shape) if each is not output}
    linear |= {name.removeprefix(prefix) for name in linear}
    return {
        name: size
        for name, size in found.items()
        if len(size) == 2
        and min(size) > 1
        and name.endswith(".weight")
        and (name in linear or EXPERT.search(name))
        and not chooses(name)
    }


def chooses(name: str) -> bool:
    """Whether a weight of this name belongs to what chooses experts."""
    return not CHOOSES.isdisjoint(name.split("."))


def _products(shape: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Name and module of each product with a matrix of weights."""
    for name, each in shape.named_modules():
        if isinstance(each, torch.nn.Linear | Conv1D):
            yield name, each


def _ignored(shape: PreTrainedModel, chosen: Iterable[str]) -> list[str]:
    """The products that keep their width."""
    prefix, known = f"{shape.base_model_prefix}.", set(chosen)
    return [
        name
        for name, _ in _products(shape)
        if not {f"{name}.weight", f"{name.removeprefix(prefix)}.weight"} & known
    ]


def _group(name: str, chosen: dict[str, tuple[int, ...]], wanted: int | None) -> int:
    """The group size. InputError for one that does not divide the columns of every matrix."""
    if wanted == WHOLE_ROW:
        return WHOLE_ROW
    fits = [each for each in GROUPS if all(size[1] % each == 0 for size in chosen.values())]
    if wanted is None:
        return fits[0] if fits else WHOLE_ROW
    for matrix, size in chosen.items():
        if size[1] % wanted:
            which = f"{fits[0]} or -1 does" if fits else "-1 does"
            raise InputError(
                f"--group-size {wanted} does not divide the {size[1]:,} columns of {matrix} in {name}: "
                f"{which}"
            )
    return wanted


def _weights(files: ModelFiles) -> Iterator[Named]:
    """Name and tensor of every weight of the checkpoint. What a GGUF file holds in blocks is float16:
    they have scales of 16 bits, and in float32 the result would be larger than the file."""
    if files.gguf is not None:
        blocks = {
            each.name
            for each in describe(read_header(files.gguf)).weights
            if SIZES[each.tensor.kind][0] not in PLAIN
        }
        for name, weight in gguf_weights(files.gguf):
            half = weight.half() if name in blocks else weight
            yield name, half if bool(half.isfinite().all()) else weight
        return
    for path in files.weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                yield name, file.get_tensor(name)


def _stored(
    weights: Iterable[Named],
    chosen: dict[str, tuple[int, ...]],
    bits: int,
    group: int,
    measured: Measured,
) -> Iterator[Named]:
    """The tensors to write."""
    for name, weight in weights:
        if name not in chosen:
            yield name, weight
            continue
        if not bool(weight.isfinite().all()):
            raise ModelError(
                f"{name} holds NaN or infinite numbers: fetch or convert the model again"
            )
        values, scales = rounded(weight, bits, group)
        measured.add(weight.float(), (values * scales.float()[:, :, None]).view(weight.shape))
        yield f"{name}_packed", packed(values.view(weight.shape), bits)
        yield f"{name}_scale", scales
        yield f"{name}_shape", torch.tensor(weight.shape)


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers, int8 [rows, groups, columns of a group], and the scales [rows, groups] in the dtype
    of `weight` [rows, columns]."""
    rows = weight.float().view(
        weight.shape[0], -1, weight.shape[1] if group == WHOLE_ROW else group
    )
    most = 1 << (bits - 1)
    scales = (rows.abs().amax(-1) / (most - 0.5)).to(weight.dtype)
    smallest = torch.finfo(weight.dtype).tiny
    scales = torch.where(scales == 0, torch.full_like(scales, smallest), scales)
    values = (rows / scales.float()[:, :, None]).round().clamp(-most, most - 1)
    return values.to(torch.int8), scales


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [rows, columns] in words, int32 [rows, columns * bits / 32 rounded up], the first lowest."""
    each = WORD // bits
    padded = torch.nn.functional.pad(
        values.long() + (1 << (bits - 1)), (0, -values.shape[1] % each)
    )
    shifts = torch.arange(each) * bits
    return (padded.view(values.shape[0], -1, each) << shifts).sum(-1).to(torch.int32)


def settings(bits: int, group: int, ignored: list[str], *, conv1d: bool) -> Json:
    """The quantization_config of config.json."""
    grouped = {"strategy": "group", "group_size": group}
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        **({"strategy": "channel", "group_size": None} if group == WHOLE_ROW else grouped),
    }
    about = {
        "targets": ["Linear", "Conv1D"] if conv1d else ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": about},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _tell(config: Path, quantization: Json) -> None:
    told = read_object(config, f"{config.parent} is incomplete")
    told.pop(NAMED, None)  # the files have their usual names now
    write_json(config, told | {"quantization_config": quantization})
