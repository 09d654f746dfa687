"""The matrices of an adapter, read for one model. What does not fit the model is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from transformers.pytorch_utils import Conv1D

from baton.adapters.files import COPY, PREFIX, A, AdapterFiles, B, read_weights
from baton.checkpoints.jsonfile import reason
from baton.errors import ModelError, OutOfMemory
from baton.memory import out_of_memory


@dataclass(frozen=True, slots=True)
class Product:
    """What an adapter adds to one linear: rows [n, in] @ a @ b. The scale is in b."""

    a: torch.Tensor  # [in, rank]
    b: torch.Tensor  # [rank, out]


Products = dict[str, Product]
"""By the name of the linear."""


def read_products(files: AdapterFiles, model: Any) -> Products:
    """The adapter's matrices, in the dtype and on the device of this PreTrainedModel, which is as it was
    loaded. Raises ModelError, OutOfMemory."""
    name = files.adapter.name
    linears = _linears(model)
    for linear in files.linears:
        _check_linear(name, linear, model)
    head = model.get_output_embeddings()
    heads = [each for each, module in linears.items() if module is head]
    missing = [e for e in files.spec.targeted(linears, heads) if e not in files.linears]
    if missing:
        raise ModelError(
            f"adapter {name} is incomplete: its target_modules name {missing[0]}, and its file holds "
            f"nothing for it; save it again"
        )
    try:
        tensors = _tensors(files)
        for key in files.copies:
            _check_copy(name, key, tensors[key], model)
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


def _linears(model: Any) -> dict[str, nn.Module]:
    """By name: what peft makes products for."""
    return {
        name: each for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D)
    }


def _check_linear(name: str, linear: str, model: Any) -> None:
    """ModelError if the model has no linear of this name, or one that has another use too."""
    try:
        module = model.get_submodule(linear)
    except AttributeError:
        raise ModelError(
            f"adapter {name} does not fit {type(model).__name__}: the model has no module "
            f"{linear[:200]}; it was trained for another one"
        ) from None
    kind = type(module)
    if isinstance(module, nn.Embedding):
        raise ModelError(
            f"adapter {name} cannot be served: it changes the embedding {linear}, and only linears can "
            "be; train it without, or merge it into the model"
        )
    if kind not in (nn.Linear, Conv1D):
        raise ModelError(
            f"adapter {name} cannot be served: {linear} is a {kind.__name__}, and only linears can be "
            "changed; train it without, or merge it into the model"
        )
    if module.weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"adapter {name} cannot be served: {linear} is also the model's embedding (they are tied), "
            "and only linears can be changed; train it without, or merge it into the model"
        )


def _check_copy(name: str, key: str, copy: torch.Tensor, model: Any) -> None:
    """ModelError unless the tensor is one of the model's own. peft writes embeddings and heads beside an
    adapter of a head, changed or not."""
    place = key[len(PREFIX) :].replace(COPY, ".weight")
    own = dict(model.named_parameters(remove_duplicate=False)).get(place)
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
    files: AdapterFiles, linear: str, module: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> Product:
    """ModelError if a matrix has another shape than the linear asks for, or holds no numbers."""
    name, weight = files.adapter.name, module.weight
    assert isinstance(weight, torch.Tensor)
    out_in = tuple(weight.shape) if isinstance(module, nn.Linear) else tuple(weight.shape)[::-1]
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
    a, scaled = (each.t().contiguous().to(weight.device, weight.dtype) for each in (a, scaled))
    return Product(a, scaled)
