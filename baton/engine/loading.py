"""Loads a model folder, or a random shape, as a transformers model with paged attention.

Only the model itself comes from transformers; generation, cache and placement belong to the engine.
"""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from baton.checkpoints.families import text_part
from baton.checkpoints.jsonfile import reason
from baton.checkpoints.mistakes import not_loaded
from baton.checkpoints.weights import count_weights
from baton.engine.attention import NAME, paged_attention
from baton.engine.device import dtype_name, free_memory
from baton.errors import ModelError, OutOfMemory
from baton.gguf.weights import gguf_weights, weight_count
from baton.memory import out_of_memory
from baton.model_files import CONTEXT_KEYS, ModelFiles
from baton.quantized.methods import FIELDS
from baton.quantized.plan import Plan
from baton.quantized.weights import full_weights

AttentionInterface.register(NAME, paged_attention)  # without a mask function, so no mask is built

DROPS_ARGUMENTS = {
    "nemotron",
    "stablelm",
}  # their layers do not pass keyword arguments to attention
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(SafetensorError, StrictDataclassError, ArithmeticError, AssertionError),
)
LAYER_RULES = {
    "num_hidden_layers": "a whole number above 0",
    "sliding_window": "null or a whole number above 0",
    "layer_types": "null or a list with the name of each layer's kind",
}
INFINITY = float("inf")
logger = logging.getLogger(__name__)
SLACK = 1_000_000  # weights that a model may have beyond twice its checkpoint
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
    except (*LOAD_ERRORS, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(_too_large(files.name, None, device)) from error


def shape_of(files: ModelFiles) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes, without memory. Raises ModelError."""
    if files.folder is not None and files.gguf is None:
        _refuse_endless(files.name, files.config, _stored(files))
    try:
        config = _random_config(files) if files.folder is None else _own_config(files, files.folder)
        with torch.device("meta"), init.no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME
            )
    except LOAD_ERRORS as error:
        raise ModelError(f"{files.name} cannot be loaded: {reason(error)}") from error
    return model


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
    stored = _stored(files)
    twice = 0 if files.quantized is None else files.quantized.twice
    _refuse_too_large(name, (stored + twice) * dtype.itemsize, device)
    _refuse_endless(name, files.config, stored)
    try:
        config = _own_config(files, folder)
        _check_layers(name, config)
        shape = _refuse_larger(name, config, stored)
        if files.quantized is not None:
            told = (name, files.quantized.about, dtype_name(dtype))
            logger.info("%s is quantized (%s): its weights are restored to %s", *told)
            model, report = _from_quantized(files.quantized, shape, config, dtype)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=NAME,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, with the shapes
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        if out_of_memory(error):
            raise
        raise not_loaded(name, folder, files.config, error) from error
    _refuse_gaps(name, model, report)
    _refuse_nonsense(name, model, dtype)
    return model.to(device)


def _from_quantized(
    plan: Plan, shape: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, Mapping[str, Iterable[Any]]]:
    """The model in full width. `shape`: it without memory."""
    conv1d = {f"{name}.weight" for name, each in shape.named_modules() if isinstance(each, Conv1D)}
    prefix = f"{shape.base_model_prefix}."
    conv1d |= {each.removeprefix(prefix) for each in conv1d}
    weights, biases = dict[str, torch.Tensor](), set[str]()
    for name, weight in full_weights(plan, dtype, conv1d):
        weights[name] = weight
        if name.endswith(".bias") and bool(weight.any()):
            biases.add(name)
    found: tuple[PreTrainedModel, Mapping[str, Iterable[Any]]] = type(shape).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        attn_implementation=NAME,
        ignore_mismatched_sizes=True,  # refused below, with the shapes
        output_loading_info=True,
    )
    if odd := biases.intersection(
        found[1]["unexpected_keys"]
    ):  # AutoGPTQ's first versions wrote zeros
        raise ModelError(
            f"{min(odd)} is not 0, and its model has no bias there; use the same model in bf16, fp16 or "
            "fp32"
        )
    return found


def _stored(files: ModelFiles) -> int:
    """How many numbers the checkpoint has, in full width. Raises ModelError."""
    return count_weights(files.weights) if files.quantized is None else files.quantized.numbers


def _own_config(files: ModelFiles, folder: Path) -> PreTrainedConfig:
    """The folder's configuration. With null for its context, which transformers refuses, it gets the
    default of its family, as if nothing were there. It says nothing of a quantization that is undone."""
    null = [key for key in CONTEXT_KEYS if key in files.config and files.config[key] is None]
    if not null:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    else:
        given = {key: value for key, value in files.config.items() if key not in null}
        config = CONFIG_MAPPING[files.model_type].from_dict(given)
    for part in (config, config.get_text_config(decoder=True)):
        for field in FIELDS:
            if hasattr(part, field):
                delattr(part, field)
    return config


def _refuse_endless(name: str, config: Mapping[str, Any], stored: int) -> None:
    """ModelError for more layers, heads or experts than the checkpoint has numbers: transformers would
    make objects for all of them."""
    for part in (config, text_part(dict(config))):
        for key, value in part.items():
            if key.startswith(("num_", "n_")) and type(value) is int and value > max(stored, 1024):
                raise ModelError(
                    f"{name} does not match its config.json: {key} is {value:,}, and the checkpoint has "
                    f"{stored:,} numbers; fetch both again from one place"
                )


def _check_layers(name: str, config: PreTrainedConfig) -> None:
    """ModelError for what the engine reads of a configuration, where transformers lets anything pass."""
    text: Any = config.get_text_config(decoder=True)
    layers, window = text.num_hidden_layers, getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    right = {
        "num_hidden_layers": type(layers) is int and layers > 0,
        "sliding_window": window is None
        or (type(window) is int and window > 0)
        or (
            window == 0 and getattr(text, "use_sliding_window", None) is False
        )  # as qwen2_moe says off
        or not (window or hasattr(type(text), "sliding_window")),  # not this family's, and off
        "layer_types": kinds is None
        or (isinstance(kinds, list | tuple) and [type(each) for each in kinds] == [str] * layers),
    }
    if wrong := [key for key, is_right in right.items() if not is_right]:
        key = text.attribute_map.get(wrong[0], wrong[0])
        value = repr(getattr(text, wrong[0]))[:80]
        raise ModelError(
            f"{name} cannot be served: {key} in config.json is {value}, but must be "
            f"{LAYER_RULES[wrong[0]]}"
        )


def _refuse_larger(name: str, config: PreTrainedConfig, stored: int) -> PreTrainedModel:
    """The model without memory. ModelError for one much larger than its checkpoint: transformers would
    fill the rest of it with random numbers, and the memory of the machine."""
    with torch.device("meta"), init.no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=NAME
        )
    described = sum(weight.numel() for weight in model.parameters())
    if described > 2 * stored + SLACK:
        raise ModelError(
            f"{name} does not match its config.json, which describes {described:,} weights: the "
            f"checkpoint has {stored:,}; fetch both again from one place"
        )
    return model


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
    except LOAD_ERRORS as error:
        if out_of_memory(error):
            raise
        raise ModelError(f"{files.name} cannot be loaded from {path}: {reason(error)}") from error
    _refuse_gaps(files.name, model, report)
    _refuse_nonsense(files.name, model, dtype)
    return model.to(device)


def _refuse_gaps(name: str, model: PreTrainedModel, report: Mapping[str, Iterable[Any]]) -> None:
    """ModelError for missing weights and those of another shape, which transformers fills with random
    numbers, and for surplus layers, which it drops with a warning."""
    if odd := sorted(report["mismatched_keys"]):
        weight, found, expected = odd[0]
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise ModelError(
            f"{name} does not match its config.json: {weight} is {list(found)} in the checkpoint "
            f"and must be {list(expected)}{more}; fetch both again from one place"
        )
    if gaps := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name} is incomplete: its checkpoint lacks {_some(gaps)}; fetch or convert it again"
        )
    known = {_numberless(key) for key in model.state_dict()}
    if surplus := sorted(key for key in report["unexpected_keys"] if _numberless(key) in known):
        raise ModelError(
            f"{name} does not match its config.json: the checkpoint also holds {_some(surplus)}; "
            "fetch both again from one place"
        )


def _refuse_nonsense(name: str, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """ModelError for a weight that is not a number, and for an infinite one in a matrix: a bias may
    forbid a token by it. One pass over the weights."""
    for key, weight in model.named_parameters():
        if not weight.numel() or not weight.is_floating_point():
            continue
        low, high = (float(each) for each in weight.detach().aminmax())
        if low != low or high != high:  # NaN
            raise ModelError(
                f"{name} is damaged: its weight {key} holds NaN, which is not a number; fetch or convert "
                "the model again"
            )
        if weight.ndim > 1 and (low == -INFINITY or high == INFINITY):
            raise ModelError(
                f"{name} cannot be loaded: its weight {key} holds infinite numbers in "
                f"{dtype_name(dtype)}; if the checkpoint has finite ones, use bfloat16 or float32"
            )


def _random_model(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model's shape with random weights, equal in every process and on every device."""
    config = _random_config(files)
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


def _random_config(files: ModelFiles) -> PreTrainedConfig:
    settings = {key: value for key, value in files.config.items() if key != "model_type"}
    return AutoConfig.for_model(files.config["model_type"], **settings)


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
