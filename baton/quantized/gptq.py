"""GPTQ, as AutoGPTQ, GPTQModel and auto-round write it.

A matrix [out, in] is stored as
    qweight  int32 [in / n, out]        n = 32 / bits integers a word, of consecutive inputs, the first in
                                        the lowest bits
    scales   float [groups, out]
    qzeros   int32 [groups, out / n]    the integer that stands for 0; in the first format less 1
    g_idx    int32 [in]                 the group of each input, which act-order (desc_act) makes
                                        irregular; without it, it may be missing

The first format subtracts 1 from each zero point by subtracting from the whole word, so that a borrow
goes into the next one. Adding it to the whole word gives the zero points back.
"""

import re
from collections.abc import Callable

from baton.checkpoints.jsonfile import Json
from baton.quantized.scheme import (
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

BITS = (2, 4, 8)
FORMATS = ("gptq", "gptq_v2")
EXCEPT, ALSO = "-:", "+:"
NAME = re.compile(r"[\w.-]+")
IN_FULL = 16  # bits: auto-round's way to say that a module is not quantized


def read_gptq(found: Json) -> Quantization:
    """The settings of GPTQ. Raises Unread."""
    kind = choice(found, "checkpoint_format", FORMATS, found.get("format") or FORMATS[0])
    choice(found, "pack_dtype", ("int32",), "int32")
    refuse_set(found, "is_marlin_format", "adapter", "rotation")
    less_one = kind == FORMATS[0]
    rules = []
    dynamic = table(found, "dynamic")
    refuse_many(dynamic)
    for key, own in dynamic.items():
        names = pattern(key.removeprefix(EXCEPT).removeprefix(ALSO), "dynamic")
        is_not = key.startswith(EXCEPT)
        settings = {} if is_not else found | table({key: own}, key)
        rules.append(Rule(names, None if is_not else _scheme(settings, less_one)))
    return Quantization((Layout.GPTQ,), _scheme(found, less_one), tuple(rules))


def read_auto_round(found: Json) -> Quantization:
    """The settings of auto-round's own format, for matrices packed as GPTQ does. Raises Unread."""
    packing = str(found.get("packing_format") or "auto_round:auto_gptq")
    less_one = "gptq" in packing and "gptqmodel" not in packing
    read = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel")
    choice(found, "packing_format", read, read[1])
    refuse_unplain(found)
    rules = rules_of(found, lambda settings: _scheme(settings, less_one))
    return Quantization((Layout.GPTQ,), _scheme(found, less_one), rules)


def rules_of(found: Json, scheme: Callable[[Json], Scheme]) -> tuple[Rule, ...]:
    """Those of auto-round's extra_config: what a module says goes before what is said of all. Raises
    Unread."""
    rules, own = list[Rule](), table(found, "extra_config")
    refuse_many(key for key in own if not NAME.fullmatch(key))
    for key in own:
        settings = found | table(own, key)
        bits = settings.get("bits")
        if type(bits) is int and bits >= IN_FULL:
            rules.append(Rule(names_of(key), None))
            continue
        refuse_unplain(settings)
        rules.append(Rule(names_of(key), scheme(settings)))
    return tuple(rules)


def refuse_unplain(found: Json) -> None:
    """Unread for what auto-round can do beyond integers for weights."""
    choice(found, "data_type", ("int",), "int")
    refuse_set(found, "rotation_config")
    bits = found.get("act_bits")
    if type(bits) is int and bits < IN_FULL:
        raise Unread(f"act_bits {bits} is not read")


def names_of(key: str) -> re.Pattern[str]:
    """What auto-round means by a key: the name of a module, or a pattern of names."""
    if NAME.fullmatch(key):
        return re.compile(re.escape(key) + r"\Z")
    return pattern(f".*(?:{key})", "extra_config")


def _scheme(found: Json, less_one: bool) -> Scheme:
    bits = choice(found, "bits", BITS, None)
    size = group(group_size(found))
    reordered = choice(found, "desc_act", (True, False), False)
    return Scheme(Layout.GPTQ, bits, size, zeros_less_one=less_one, reordered=reordered)
