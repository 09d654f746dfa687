"""compressed-tensors, as llm-compressor, auto-round and `python main.py quantize` write it.

A matrix [out, in] is stored as
    weight_packed      int32 [out, in / n]    n = 32 / bits integers a word, each plus 2^(bits - 1), the
                                              first in the lowest bits
    weight_shape       int64 [2]              out and in
or  weight             int8 or FP8 [out, in]
with
    weight_scale       float [1], [out, 1], [out, groups] or a number for each block
    weight_zero_point  as many integers; beside weight_packed packed too, along the outputs
    weight_g_idx       int32 [in]             the group of each input, if act-order made it irregular

Scales of inputs and outputs, and of the KV cache, say how an engine may round what it computes. Here it
is not rounded, so they are left out.
"""

import re

from baton.checkpoints.jsonfile import Json
from baton.quantized.scheme import (
    ROW,
    WHOLE,
    Block,
    Layout,
    Quantization,
    Rule,
    Scheme,
    Unread,
    choice,
    group,
    group_size,
    pattern,
    refuse_many,
    refuse_set,
    table,
)

PACKED_BITS = (2, 4, 8)
LAYOUTS = {
    "pack-quantized": Layout.PACKED,
    "int-quantized": Layout.SCALED,
    "float-quantized": Layout.SCALED,
    "naive-quantized": Layout.SCALED,
}
MIXED = "mixed-precision"
REGEX = "re:"
CLASS = re.compile(r"[A-Z]\w*")
"""A target of this form names a class of modules, such as Linear, and not a module."""


def read_compressed(found: Json) -> Quantization:
    """The settings of compressed-tensors. Raises Unread."""
    kind = choice(found, "format", (*LAYOUTS, MIXED), "pack-quantized")
    sparse = table(found, "sparsity_config")
    choice(sparse, "format", ("dense",), "dense")
    refuse_set(found, "transform_config")
    groups = table(found, "config_groups")
    if not groups:
        raise Unread("config_groups is empty")
    exact, patterns, classes = list[Rule](), list[Rule](), list[Scheme]()
    for name, about in groups.items():
        scheme = _scheme(name, about, kind)
        for target in _targets(name, about):
            if scheme is None:
                continue
            if target.startswith(REGEX):
                patterns.append(Rule(pattern(target.removeprefix(REGEX), name), scheme))
            elif CLASS.fullmatch(target):
                classes.append(scheme)
            else:
                exact.append(Rule(re.compile(re.escape(target) + r"\Z"), scheme))
    if len(set(classes)) > 1:
        raise Unread("config_groups has several groups for classes of modules, which is not read")
    layouts = {rule.scheme.layout for rule in (*exact, *patterns) if rule.scheme}
    layouts |= {scheme.layout for scheme in classes}
    refuse_many(patterns)
    return Quantization(
        tuple(each for each in Layout if each in layouts),
        classes[0] if classes else None,
        (*exact, *patterns),
    )


def _targets(name: str, about: Json) -> list[str]:
    found = about.get("targets")
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Unread(f"the targets of {name} are not a list of names")
    return found


def _scheme(name: str, about: object, kind: str) -> Scheme | None:
    """Of the weights of a group; None if they are in full width."""
    if not isinstance(about, dict):
        raise Unread(f"{name} in config_groups is not an object")
    weights = about.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise Unread(f"the weights of {name} are not an object")
    own = about.get("format") or kind
    layout = LAYOUTS.get(choice({"format": own}, "format", tuple(LAYOUTS), None))
    assert layout is not None
    is_float = choice(weights, "type", ("int", "float"), "int") == "float"
    if layout is Layout.PACKED:
        choice(weights, "type", ("int",), "int")
    bits = choice(weights, "num_bits", PACKED_BITS if layout is Layout.PACKED else (8,), 8)
    symmetric = choice(weights, "symmetric", (True, False), True)
    return Scheme(
        *(layout, bits, _block(weights), is_float, symmetric), reordered=_reordered(weights)
    )


def _reordered(weights: Json) -> bool:
    """Whether act-order gave the columns other groups than those in turn. `weight` only changed the order
    in which they were rounded."""
    given = weights.get("actorder")
    lower = {"actorder": given.lower()} if isinstance(given, str) else weights
    in_turn = (False, "weight", "static")
    return choice(lower, "actorder", (*in_turn, True, "group", "dynamic"), False) not in in_turn


def _block(weights: Json) -> Block:
    given = weights.get("group_size")
    inferred = "tensor" if given is None else "channel" if given == -1 else "group"
    match choice(weights, "strategy", ("tensor", "channel", "group", "block"), inferred):
        case "tensor":
            return WHOLE
        case "channel":
            return ROW
        case "group":
            return group(group_size(weights))
    return block_of(weights, "block_structure")


def block_of(found: Json, key: str) -> Block:
    """Rows and columns that share a scale. Unread if they are no pair of numbers."""
    sizes = found.get(key)
    if (
        not isinstance(sizes, list | tuple)
        or len(sizes) != 2
        or not all(type(each) is int and 0 < each < 1 << 31 for each in sizes)
    ):
        raise Unread(f"{key} {str(sizes)[:80]!r} is not read (two numbers above 0 are)")
    return Block(*sizes)
