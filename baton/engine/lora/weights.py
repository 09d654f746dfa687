"""The matrices of an adapter, read for one model. What does not fit the model is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from baton.adapters.files import COPY, PREFIX, A, AdapterFiles, B, read_weights
from baton.checkpoints.jsonfile import reason
from baton.engine.lora.base import Base, Linear
from baton.errors import ModelError, OutOfMemory
from baton.memory import out_of_memory


@dataclass(frozen=True, slots=True)
class Product:
    """What an adapter adds to one linear: rows [n, in] @ a @ b. The scale is in b."""

    a: torch.Tensor  # [in, rank]
    b: torch.Tensor  # [rank, out]


Products = dict[str, Product]
"""By the name of the linear."""


def read_products(files: AdapterFiles, base: Base) -> Products:
    """The adapter's matrices, in the dtype and on the device of the model's linears. Raises ModelError,
    OutOfMemory."""
    name, linears = files.adapter.name, base.linears
    for linear in files.linears:
        _check_linear(name, linear, base)
    missing = [e for e in files.spec.targeted(linears, base.heads) if e not in files.linears]
    if missing:
        raise ModelError(
            f"adapter {name} is incomplete: its target_modules name {missing[0]}, and its file holds "
            f"nothing for it; save it again"
        )
    try:
        tensors = _tensors(files)
        for key in files.copies:
            _check_copy(name, key, tensors[key], base)
        return {each: _product(files, each, linears[each], tensors) for each in files.linears}
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise OutOfMemory(f"adapter {name} does not fit the memory: {reason(error)}") from error
        raise ModelError(
            f"adapter {name}: {files.weights} cannot be read: {reason(error)}"
        ) from error


def _tensors(files: AdapterFiles) -> dict[str, torch.Tensor]:
    try:
        return load(read_weights(files))
    except KeyError as error:  # that is how safetensors tells of a dtype that torch has not
        raise ModelError(
            f"adapter {files.adapter.name} cannot be served: {files.weights} holds numbers of the type "
            f"{error}; save it in float32, bfloat16 or float16"
        ) from error


def _check_linear(name: str, linear: str, base: Base) -> None:
    """ModelError if the model has no linear of this name, or one that has another use too."""
    model, known = base.model, base.linears.get(linear)
    if known is not None and known.plain and not known.tied:
        return
    if known is not None and known.plain:
        raise ModelError(
            f"adapter {name} cannot be served: {linear} is also the model's embedding (they are tied), "
            "and only linears can be changed; train it without, or merge it into the model"
        )
    try:
        module = model.get_submodule(linear)
    except AttributeError:
        raise ModelError(
            f"adapter {name} does not fit {type(model).__name__}: the model has no module "
            f"{linear[:200]}; it was trained for another one"
        ) from None
    if isinstance(module, nn.Embedding):
        raise ModelError(
            f"adapter {name} cannot be served: it changes the embedding {linear}, and only linears can "
            "be; train it without, or merge it into the model"
        )
    raise ModelError(
        f"adapter {name} cannot be served: {linear} is a {type(module).__name__}, and only linears can "
        "be changed; train it without, or merge it into the model"
    )


def _check_copy(name: str, key: str, copy: torch.Tensor, base: Base) -> None:
    """ModelError unless the tensor is one of the model's own. peft writes embeddings and heads beside an
    adapter of a head, changed or not."""
    place = key[len(PREFIX) :].replace(COPY, ".weight")
    own = base.weight(place)
    if own is None:
        raise ModelError(
            f"adapter {name} cannot be served: its file also holds {place[:200]}, which is neither "
            "part of a product nor a weight of the model; save it again, or merge it into the model"
        )
    copy = copy.to(own.device)
    if own.shape != copy.shape or not (
        torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))
    ):
        raise ModelError(
            f"adapter {name} cannot be served: it replaces the model's {place}, by its training or "
            "because it belongs to another model; only linears can be changed: merge it into the model"
        )


def _product(
    files: AdapterFiles, linear: str, module: Linear, tensors: Mapping[str, torch.Tensor]
) -> Product:
    """ModelError if a matrix has another shape than the linear asks for, or holds no numbers."""
    name, out_in = files.adapter.name, module.out_in
    a, b = (tensors[f"{PREFIX}{linear}{half}"] for half in (A, B))
    if (len(b), a.shape[1]) != out_in:
        raise ModelError(
            f"adapter {name} does not fit the model: for {linear} it maps {a.shape[1]} numbers to "
            f"{len(b)}, and the model {out_in[1]} to {out_in[0]}; it was trained for another one"
        )
    if not a.is_floating_point() or not b.is_floating_point():
        raise ModelError(
            f"adapter {name} cannot be served: its matrices of {linear} hold {a.dtype} and {b.dtype}; "
            "save it in float32, bfloat16 or float16"
        )
    if not a.isfinite().all() or not b.isfinite().all():
        raise ModelError(
            f"adapter {name} is damaged: its matrices of {linear} hold numbers that are not finite; "
            "fetch it again"
        )
    scaled = b.float() * files.spec.share(linear).scale
    a, scaled = (each.t().contiguous().to(module.device, module.dtype) for each in (a, scaled))
    return Product(a, scaled)
