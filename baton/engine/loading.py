"""Loads a model folder, or a random shape, as a transformers model with paged attention.

Only the model itself comes from transformers; generation, cache and placement belong to the engine.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging as transformers_logging

from baton.engine.attention import NAME, paged_attention
from baton.engine.device import DTYPES, free_memory
from baton.errors import ModelError, OutOfMemory
from baton.gguf.weights import gguf_weights, weight_count
from baton.model_files import ModelFiles

AttentionInterface.register(NAME, paged_attention)  # without a mask function, so no mask is built

DROPS_ARGUMENTS = {
    "nemotron",
    "stablelm",
}  # their layers do not pass keyword arguments to attention
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
NOISE = 4_194_301  # a prime, so that rows of a matrix do not repeat the same noise


def load_model(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `dtype` on `device`, ready to run. Raises ModelError if the checkpoint is damaged or
    incomplete, OutOfMemory if it does not fit."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if files.folder is None:
            return prepare(_random_model(files, device, dtype))
        return prepare(_checkpoint(files, files.folder, device, dtype))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_too_large(files.name, None, device)) from error


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Set the model to inference, and pass the keyword argument `baton` to every attention layer."""
    model.eval().requires_grad_(False)
    if model.config.model_type in DROPS_ARGUMENTS:
        for layer in [each for each in model.modules() if hasattr(each, "self_attn")]:
            layer.register_forward_pre_hook(_pass_context, with_kwargs=True)
    return model


def _pass_context(layer: Any, args: object, given: dict[str, object]) -> None:
    layer.self_attn.baton = given.get("baton")


def _checkpoint(
    files: ModelFiles, folder: Path, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    name = files.name
    if files.gguf is not None:
        return _from_gguf(files, files.gguf, folder, device, dtype)
    stored = DTYPES.get(str(files.config.get("dtype", files.config.get("torch_dtype"))), dtype)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _refuse_too_large(name, size * dtype.itemsize // stored.itemsize, device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise ModelError(f"{name} cannot be loaded from {folder}: {_one_line(error)}") from error
    _refuse_gaps(name, model, report["missing_keys"], report["unexpected_keys"])
    return model.to(device)


def _from_gguf(
    files: ModelFiles, path: Path, folder: Path, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """`folder` has the configuration, the file at `path` the weights."""
    _refuse_too_large(files.name, weight_count(path) * dtype.itemsize, device)
    kind = getattr(transformers, files.architecture)  # the name is one of baton/gguf/config.py
    try:
        weights = {name: tensor.to(dtype) for name, tensor in gguf_weights(path)}
        model, report = kind.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(folder, local_files_only=True),
            state_dict=weights,
            dtype=dtype,
            attn_implementation=NAME,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{files.name} cannot be loaded from {path}: {_one_line(error)}"
        ) from error
    _refuse_gaps(files.name, model, report["missing_keys"], report["unexpected_keys"])
    return model.to(device)


def _refuse_gaps(
    name: str, model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """ModelError for missing weights, which transformers fills with random numbers, and for surplus
    layers, which it drops with a warning."""
    if gaps := sorted(missing):
        raise ModelError(
            f"{name} is incomplete: its checkpoint lacks {_some(gaps)}; fetch or convert it again"
        )
    known = {_numberless(key) for key in model.state_dict()}
    if surplus := sorted(key for key in unexpected if _numberless(key) in known):
        raise ModelError(
            f"{name} does not match its config.json: the checkpoint also holds {_some(surplus)}; "
            "fetch both again from one place"
        )


def _random_model(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model's shape with random weights, equal in every process and on every device."""
    settings = {key: value for key, value in files.config.items() if key != "model_type"}
    config = AutoConfig.for_model(files.config["model_type"], **settings)
    for place in (torch.device("meta"), device):  # first without memory, to compute the size
        with place, init.no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=NAME
            )
        model.tie_weights()
        if place != device:
            weights = sum(weight.nbytes for weight in model.parameters())
            _refuse_too_large(files.name, weights, device)
    _fill_with_noise(model, std=config.initializer_range, seed=0)
    return model


@torch.no_grad()
def _fill_with_noise(model: PreTrainedModel, *, std: float, seed: int) -> None:
    """Biases 0, norms 1, matrices normal. The noise is drawn once on the CPU and repeated, for speed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NOISE, generator=generator).mul_(std)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    noise = noise.to(device, dtype)
    offset = 0
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat = weight.view(-1)
        done = 0
        while done < len(flat):
            piece = noise[offset : offset + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done += len(piece)
            offset = (offset + len(piece)) % NOISE


def _refuse_too_large(name: str, weights: int, device: torch.device) -> None:
    if weights > free_memory(device):
        raise OutOfMemory(_too_large(name, weights, device))


def _too_large(name: str, weights: int | None, device: torch.device) -> str:
    needed = "" if weights is None else f": {weights / 2**30:.1f} GiB are needed"
    return (
        f"{name} does not fit {device}{needed}, {free_memory(device) / 2**30:.1f} GiB are free; "
        "use a smaller model, another device or a smaller dtype"
    )


def _numberless(key: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", key)


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
