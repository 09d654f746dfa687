"""Plan: which part of a model's parameters each rank of a tensor-parallel worker holds.

transformers says for most architectures which matrices are cut by columns, so that each rank computes
some of the heads or some of the inner features, and which by rows, so that the ranks' results are added:

    x (whole)   q, k, v by columns -> some heads -> attention -> o by rows -> sum over the ranks
    x (whole)   gate, up by columns -> some features          -> down by rows -> sum over the ranks

Everything else is whole on every rank. The plan is made from shapes alone, so a model on the meta device
is enough. Whether it is right is checked with numbers when the model is loaded (boot.py).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from math import gcd
from typing import Any

import torch

from baton.errors import InputError, ModelError

COLUMNS, ROWS = "colwise", "rowwise"
PACKED_COLUMNS, PACKED_ROWS = "packed_colwise", "packed_rowwise"
JOINED, SPLIT = "colwise_gather_output", "rowwise_split_input"
SUM = "moe_tp_experts"
WHOLE = {"replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise"}
KNOWN = {COLUMNS, ROWS, PACKED_COLUMNS, PACKED_ROWS, JOINED, SPLIT, SUM, *WHOLE}
FUSED = "fused_qkv"  # ours: queries, keys and values side by side in one matrix

OURS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": FUSED,
        "h.*.attn.c_proj": ROWS,
        "h.*.mlp.c_fc": COLUMNS,
        "h.*.mlp.c_proj": ROWS,
    }
}
"""By model type, where transformers has no plan."""

PARTS = {PACKED_COLUMNS: 2, PACKED_ROWS: 2, FUSED: 3}
COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "split_size")
"""Fields of attention modules that count what is cut."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter is cut along `dim` into equal pieces, one for each rank; if it holds several matrices
    side by side there (`parts`), each of them is."""

    dim: int
    parts: int = 1

    def take(self, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """A rank's piece, a copy."""
        matrices = whole.chunk(self.parts, self.dim)
        return torch.cat([each.chunk(ranks, self.dim)[rank] for each in matrices], self.dim)


@dataclass(slots=True)
class Plan:
    """For one model and number of ranks. Parameters without a cut are whole on every rank."""

    ranks: int
    cuts: dict[str, Cut] = field(default_factory=dict)  # by parameter
    once: set[str] = field(
        default_factory=set
    )  # biases of sums: the first rank has it, others zeros
    sums: list[str] = field(default_factory=list)  # modules whose outputs are added over the ranks
    joined: list[str] = field(default_factory=list)  # modules whose outputs are put side by side
    split: list[str] = field(default_factory=list)  # modules that take a rank's part of their input
    fewer: list[str] = field(default_factory=list)  # attention modules: COUNTS are divided


def plan_sharding(model: Any, ranks: int, name: str) -> Plan:
    """The plan for a PreTrainedModel, also on the meta device. `name`: of the model, for errors.
    ModelError if it cannot be divided at all, InputError if not into so many ranks."""
    styles = dict(_styles(model, name))
    plan, sizes = Plan(ranks), [*_heads(model)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for module, style in styles.items():
        if module in parameters:
            _add(plan, module, parameters[module], style, transposed=False)
            continue
        own = dict(modules[module].named_parameters(recurse=False))
        if style == SUM or style in (ROWS, SPLIT, PACKED_ROWS):
            plan.sums.append(module)
        plan.joined += [module] if style == JOINED else []
        plan.split += [module] if style == SPLIT else []
        if style != SUM:
            transposed = type(modules[module]).__name__ == "Conv1D"
            for each, weight in own.items():
                _add(plan, f"{module}.{each}", weight, style, transposed=transposed)
    _add_head(plan, model, modules)
    sizes += [parameters[each].shape[cut.dim] // cut.parts for each, cut in plan.cuts.items()]
    _check_attention(styles, name)
    _check_sizes(name, ranks, sizes, _heads(model)[1])
    places = {each.rpartition(".")[0] for each in styles}
    plan.fewer = sorted(each for each in places if each in modules and _attends(each))
    return plan


def kv_heads(model: Any) -> int:
    """Of the model's config: heads with keys and values of their own."""
    return _heads(model)[1]


def _heads(model: Any) -> tuple[int, int]:
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _styles(model: Any, name: str) -> Iterator[tuple[str, str]]:
    """Each module or parameter that the architecture's plan names, and how it is cut."""
    config = model.config.get_text_config(decoder=True)
    rules: Mapping[str, str] | None = getattr(config, "base_model_tp_plan", None)
    rules = OURS.get(config.model_type) or rules
    if not rules:
        raise ModelError(
            f"{name} cannot be divided: transformers has no tensor-parallel plan for "
            f"{config.model_type}; serve it without --tensor-parallel-size"
        )
    if strange := sorted(set(rules.values()) - KNOWN - {FUSED}):
        raise ModelError(
            f"{name} cannot be divided: its tensor-parallel plan uses {', '.join(strange)}, which is "
            "not known here; serve it without --tensor-parallel-size"
        )
    body, prefix = model.base_model, _prefix(model)
    places = [each for each, _ in body.named_modules()]
    places += [each for each, _ in body.named_parameters(remove_duplicate=False)]
    for rule, style in rules.items():
        pattern = re.compile(re.escape(rule).replace(r"\*", r"\d+"))
        yield from ((prefix + each, style) for each in places if pattern.fullmatch(each))


def _prefix(model: Any) -> str:
    """Of the names of the body's modules."""
    (found,) = [each for each, module in model.named_modules() if module is model.base_model]
    return f"{found}." if found else ""


def _add(plan: Plan, name: str, weight: torch.Tensor, style: str, *, transposed: bool) -> None:
    """The cut of one parameter. Linear layers hold [out, in], experts [experts, out, in]."""
    if style in WHOLE:
        return
    rows = style in (ROWS, SPLIT, PACKED_ROWS)
    if weight.ndim == 1:
        if rows:
            plan.once.add(name)
        else:
            plan.cuts[name] = Cut(0, PARTS.get(style, 1))
        return
    plan.cuts[name] = Cut(weight.ndim - (1 if rows != transposed else 2), PARTS.get(style, 1))


def _add_head(plan: Plan, model: Any, modules: Mapping[str, Any]) -> None:
    """An lm_head of its own is cut by columns, where the vocabulary can be divided. One that shares its
    weights with the embeddings is whole."""
    head = modules.get("lm_head")
    tied = model.config.get_text_config(decoder=True).tie_word_embeddings
    if type(head) is not torch.nn.Linear or tied or head.out_features % plan.ranks:
        return
    plan.joined.append("lm_head")
    for each, _ in head.named_parameters():
        plan.cuts[f"lm_head.{each}"] = Cut(0)


def _attends(place: str) -> bool:
    return "attn" in place.rpartition(".")[2] or "attention" in place.rpartition(".")[2]


def _check_attention(styles: Mapping[str, str], name: str) -> None:
    """ModelError unless each rank computes some of the heads: the KV pool is divided by heads."""
    found = {style for place, style in styles.items() if _attends(place.rpartition(".")[0])}
    if ROWS not in found or found & {JOINED, SPLIT}:
        raise ModelError(
            f"{name} cannot be divided: its tensor-parallel plan leaves attention whole on every rank; "
            "serve it without --tensor-parallel-size"
        )


def _check_sizes(name: str, ranks: int, sizes: list[int], heads: int) -> None:
    common = reduce(gcd, sizes)
    if common % ranks == 0:
        return
    possible = [str(n) for n in range(2, common + 1) if common % n == 0]
    raise InputError(
        f"{name} has {heads} KV heads and cannot be divided among {ranks} ranks: "
        f"--tensor-parallel-size can be {', '.join(possible) or 'only 1'}"
    )
