"""AWQ, in the layout that AutoAWQ calls GEMM; GPTQModel and auto-round write it, too.

A matrix [out, in] is stored as
    qweight  int32 [in, out / 8]        8 integers of 4 bits a word, of outputs 0 2 4 6 1 3 5 7, the first
                                        in the lowest bits
    qzeros   int32 [groups, out / 8]    the integer that stands for 0, packed in the same way
    scales   float [groups, out]
"""

from baton.checkpoints.jsonfile import Json
from baton.quantized.gptq import refuse_unplain, rules_of
from baton.quantized.scheme import (
    Layout,
    Quantization,
    Scheme,
    choice,
    group,
    group_size,
    refuse_set,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs that the 4 bits of a word belong to, the lowest first."""


def read_awq(found: Json) -> Quantization:
    """The settings of AWQ, also under the names of its first quant_config.json. Raises Unread."""
    for key in ("version", "format", "checkpoint_format"):
        given = found.get(key)
        lower = {key: given.lower()} if isinstance(given, str) else found
        choice(lower, key, ("gemm",), "gemm")
    refuse_set(found, "rotation", "adapter")
    return Quantization((Layout.AWQ,), _scheme(found))


def read_auto_round_awq(found: Json) -> Quantization:
    """The settings of auto-round's own format, for matrices packed as AWQ does. Raises Unread."""
    choice(found, "packing_format", ("auto_round:auto_awq", "auto_round:awq"), None)
    refuse_unplain(found)
    return Quantization((Layout.AWQ,), _scheme(found), rules_of(found, _scheme))


def _scheme(found: Json) -> Scheme:
    choice(found, "w_bit" if "w_bit" in found else "bits", (4,), None)
    size = group_size(found, "q_group_size" if "q_group_size" in found else "group_size")
    return Scheme(Layout.AWQ, 4, group(size))
