"""Adapters as peft 0.21 writes them (compared with its own files once), and the model they merge into."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8,
    "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": [], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
"""adapter_config.json, all fields."""


@dataclass(frozen=True)
class Written:
    """An adapter's folder, and what it adds to the weights of the linears."""

    folder: Path
    deltas: dict[str, torch.Tensor]  # [out, in]


def write_adapter(
    folder: Path, model: PreTrainedModel, linears: Sequence[str], *, seed: int = 0, **config: Any
) -> Written:
    """An adapter with random matrices for these linears. They are large, so that tokens change. With
    the head among them the file holds copies of the model's, as peft's does."""
    generator = torch.Generator().manual_seed(seed)
    config = CONFIG | {"target_modules": sorted({each.split(".")[-1] for each in linears})} | config
    tensors, deltas = {}, {}
    for linear in linears:
        module = model.get_submodule(linear)
        out, width = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
        rank = _of(config["rank_pattern"], linear, config["r"])
        alpha = _of(config["alpha_pattern"], linear, config["lora_alpha"])
        a = torch.randn(rank, width, generator=generator) / math.sqrt(width)
        b = torch.randn(out, rank, generator=generator) / math.sqrt(rank)
        tensors[f"base_model.model.{linear}.lora_A.weight"] = a
        tensors[f"base_model.model.{linear}.lora_B.weight"] = b
        deltas[linear] = b @ a * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
        if linear == "lm_head":
            tensors[f"base_model.model.{linear}.base_layer.weight"] = module.weight.detach().clone()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return Written(folder, deltas)


def merged(base: Path, adapter: Written | None) -> PreTrainedModel:
    """transformers' own model with the adapter in its weights, as peft's merge_and_unload() leaves it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for linear, delta in (adapter.deltas if adapter is not None else {}).items():
        module = model.get_submodule(linear)
        with torch.no_grad():
            module.weight += delta.T if isinstance(module, Conv1D) else delta
    return model


def continued(model: PreTrainedModel, prompt: Sequence[int], length: int) -> list[int]:
    """transformers' greedy continuation."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
        )
    return out[0, len(prompt) :].tolist()


def linears(model: PreTrainedModel, pattern: str = ".*") -> list[str]:
    """Names of the model's linears that match, without the head."""
    found = [n for n, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D)]
    return [n for n in found if re.fullmatch(pattern, n) and n not in ("lm_head", "embed_out")]


def _of(patterns: dict[str, Any], linear: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", linear)), default)
