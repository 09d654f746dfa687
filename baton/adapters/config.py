"""LoraSpec: what an adapter_config.json of peft says, as far as it changes a number; the rest is refused
by name.

    product with rows x:   x W^T + scale * (x A^T) B^T       A [rank, in], B [out, rank]
    scale:                 alpha / rank, or alpha / sqrt(rank) with use_rslora

https://github.com/huggingface/peft, LoraConfig.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from baton.checkpoints.jsonfile import Json
from baton.checkpoints.patterns import MOST, OddPattern, compiled
from baton.errors import ModelError

LARGEST_RANK = 256
LARGEST_ALPHA = 10**9
NUMBER = "number_of_the_layer"
"""A group's name, so that a pattern around it may have groups, too."""
NAME = re.compile(r"[\w.]+")
"""A pattern that is a name."""
ALL_LINEAR = "all-linear"
PLAIN_STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which a training begins at the model's own weights."""
MERGE = "merge it into the model (peft: merge_and_unload) and serve that"

HARMLESS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
        *("eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout"),
        *("lora_ga_config", "megatron_config", "megatron_core", "peft_version", "revision"),
        *("qalora_group_size", "runtime_config", "task_type"),
    )
)
"""Fields that change the training, or say how it went. How it began is in init_lora_weights."""
READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "init_lora_weights",
    )
)
REFUSED = {
    "use_dora": "it is a DoRA adapter, which scales whole weights",
    "lora_bias": "its B matrices have a bias",
    "modules_to_save": "it holds whole modules beside its products",
    "trainable_token_indices": "it holds embeddings of tokens",
    "target_parameters": "it changes parameters that are no linears, such as those of experts",
    "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "it applies from a sequence of tokens on (aLoRA)",
    "use_qalora": "it is a QALoRA adapter",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "arrow_config": "it routes between adapters (Arrow)",
    "monteclora_config": "it is a MonteCLoRA adapter",
    "kasa_config": "it is a KaSA adapter",
    "velora_config": "it is a VeLoRA adapter",
}
"""Fields that, if they are set, make another product of it."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one linear: its rank, and the factor of its product."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Which linears an adapter has a product for, and of which rank and scale."""

    rank: int
    alpha: float
    rslora: bool
    ranks: tuple[tuple[str, int], ...]  # by pattern of names
    alphas: tuple[tuple[str, float], ...]
    targets: str | tuple[str, ...]  # a pattern, or ends of names
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]  # empty: all
    layer_patterns: tuple[str, ...]

    def share(self, module: str) -> Share:
        """Of the linear with this name, as peft finds it: the first pattern that matches its end."""
        rank = _by_pattern(self.ranks, module, self.rank)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return Share(int(rank), alpha / (sqrt(rank) if self.rslora else rank))

    def targeted(self, linears: Iterable[str], heads: Collection[str]) -> list[str]:
        """Those of a model's linears for which peft would make a product. `heads`: those that make
        logits, which are not meant by all-linear."""
        return [each for each in linears if self._targets(each, heads)]

    def _targets(self, module: str, heads: Collection[str]) -> bool:
        if self.excluded and _named(self.excluded, module):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL_LINEAR:
                return module not in heads
            return re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        return _named(self.targets, module) and (not self.layers or self._layer(module))

    def _layer(self, module: str) -> bool:
        """Whether the linear belongs to one of the named layers."""
        patterns = [_layer_pattern(each) for each in self.layer_patterns]
        for pattern in patterns or [rf".*?\.[^.]*\.(?P<{NUMBER}>\d+)\."]:
            if found := re.match(pattern, module):
                return int(found[NUMBER]) in self.layers
        return False


def read_spec(name: str, config: Json) -> LoraSpec:
    """The adapter's spec. ModelError that names the field, for what is not served."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"adapter {name} cannot be served: its peft_type is {kind!r:.80}, and only LORA is; {MERGE}"
        )
    for field, why in REFUSED.items():
        if config.get(field):
            raise ModelError(f"adapter {name} cannot be served: {why} ({field}); {MERGE}")
    if (bias := config.get("bias", "none")) != "none":
        raise ModelError(
            f"adapter {name} cannot be served: it also changes biases (bias is {bias!r:.80}); {MERGE}"
        )
    start = config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise ModelError(
            f"adapter {name} cannot be served: init_lora_weights {start!r:.80} changes the model's own "
            "weights; save it with peft's path_initial_model_for_weight_conversion"
        )
    for field, value in config.items():
        if value and field not in HARMLESS | READ:
            raise ModelError(
                f"adapter {name} cannot be served: {field[:80]!r} in adapter_config.json is not known "
                f"here and may change what it computes; {MERGE}"
            )
    return _spec(name, config)


def _spec(name: str, config: Json) -> LoraSpec:
    ranks = _patterns(name, config, "rank_pattern")
    alphas = _patterns(name, config, "alpha_pattern")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    for field, value in (("r", rank), *(("rank_pattern", each) for _, each in ranks)):
        if type(value) is not int or not 0 < value <= LARGEST_RANK:
            raise ModelError(
                f"adapter {name} cannot be served: {field} in adapter_config.json must be a rank of 1 to "
                f"{LARGEST_RANK}, got {value!r:.80}"
            )
    for field, value in (("lora_alpha", alpha), *(("alpha_pattern", each) for _, each in alphas)):
        if type(value) not in (int, float) or not -LARGEST_ALPHA <= value <= LARGEST_ALPHA:
            raise ModelError(
                f"adapter {name} cannot be served: {field} in adapter_config.json must be a number of at "
                f"most {LARGEST_ALPHA:,}, got {value!r:.80}"
            )
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers or []
    if not isinstance(layers, list) or not all(type(each) is int for each in layers):
        raise ModelError(
            f"adapter {name}: layers_to_transform in adapter_config.json must be numbers of layers"
        )
    targets = _names(name, config, "target_modules")
    if not targets:
        raise ModelError(f"adapter {name}: target_modules in adapter_config.json names no linear")
    patterns = _names(name, config, "layers_pattern")
    return LoraSpec(
        rank=rank,
        alpha=float(alpha),
        rslora=bool(config.get("use_rslora")),
        ranks=tuple(ranks),
        alphas=tuple((pattern, float(value)) for pattern, value in alphas),
        targets=targets,
        excluded=_names(name, config, "exclude_modules"),
        layers=tuple(layers),
        layer_patterns=(patterns,) if isinstance(patterns, str) and patterns else tuple(patterns),
    )


def _patterns(name: str, config: Json, field: str) -> list[tuple[str, Any]]:
    found = config.get(field) or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"adapter {name}: {field} in adapter_config.json must be an object")
    if (count := sum(not NAME.fullmatch(each) for each in found)) > MOST:
        raise ModelError(
            f"adapter {name}: {field} in adapter_config.json has {count:,} patterns: at most "
            f"{MOST:,} are read"
        )
    for pattern in found:
        _check_pattern(name, field, pattern, _end_pattern(pattern))
    return list(found.items())


def _names(name: str, config: Json, field: str) -> str | tuple[str, ...]:
    """A pattern, or a list of names without order; empty if the field says nothing."""
    found = config.get(field)
    if isinstance(found, str):
        used = _layer_pattern(found) if field == "layers_pattern" else found
        _check_pattern(name, field, found, used)
        return found
    if found is not None and not (
        isinstance(found, list) and all(isinstance(each, str) for each in found)
    ):
        raise ModelError(
            f"adapter {name}: {field} in adapter_config.json must be a text or a list of texts"
        )
    if field == "layers_pattern":
        if found and len(found) > MOST:
            raise ModelError(
                f"adapter {name}: {field} in adapter_config.json has {len(found):,} patterns: at most "
                f"{MOST:,} are read"
            )
        for each in found or ():
            _check_pattern(name, field, each, _layer_pattern(each))
    return tuple(found or ())


def _check_pattern(name: str, field: str, pattern: str, used: str) -> None:
    """ModelError for one that cannot be used, alone or where it is put: `used`."""
    try:
        re.compile(used)
        compiled(pattern)
    except (OddPattern, re.error, RecursionError, OverflowError) as error:
        why = str(error) if isinstance(error, OddPattern) else f"cannot be read: {error}"
        raise ModelError(
            f"adapter {name}: {field} in adapter_config.json has the pattern {pattern[:80]!r}, which "
            f"{why}"
        ) from error


def _end_pattern(pattern: str) -> str:
    """As peft matches the end of a name."""
    return rf"(.*\.)?({pattern})$"


def _layer_pattern(pattern: str) -> str:
    return rf"(?:^|.*?\.)(?:{pattern})\.(?P<{NUMBER}>\d+)\."


def _by_pattern(patterns: Iterable[tuple[str, float]], module: str, default: float) -> float:
    for pattern, value in patterns:
        if re.match(_end_pattern(pattern), module):
            return value
    return default


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a pattern matches the whole name, or a name of a list is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in names)
