"""FP8: checkpoints as DeepSeek and Qwen publish them (quant_method fp8), and those of fbgemm_fp8.

A matrix [out, in], or a stack of them, is stored as
    weight             FP8 (e4m3) [out, in]
    weight_scale_inv   float [out / 128, in / 128], rounded up: the factor of each block. Also called
                       weight_scale; also one number for all, or one for each row

Scales of inputs say how an engine may round what it computes. Here it is not rounded, so they are left
out.
"""

from baton.checkpoints.jsonfile import Json
from baton.quantized.compressed import block_of
from baton.quantized.scheme import Layout, Quantization, Scheme, choice

FORMATS = ("e4m3", "float8_e4m3fn")


def read_fp8(found: Json) -> Quantization:
    """The settings of FP8. Raises Unread."""
    choice(found, "fmt", FORMATS, FORMATS[0])
    choice(found, "expert_dtype", ("fp8",), "fp8")
    sizes = found.get("weight_block_size")
    block = None if sizes is None else block_of(found, "weight_block_size")
    return Quantization((Layout.SCALED,), Scheme(Layout.SCALED, 8, block, is_float=True))
