"""MXFP4: the experts of gpt-oss, as OpenAI publishes them.

A stack of matrices, which the model keeps as [experts, in, out], is stored as
    NAME_blocks  uint8 [experts, out, in / 32, 16]    two numbers of 4 bits a byte, the first in the low
    half NAME_scales  uint8 [experts, out, in / 32]        the power of two of each 32 numbers, plus 127
"""

from baton.checkpoints.jsonfile import Json
from baton.quantized.scheme import Block, Layout, Quantization, Scheme

COLUMNS = 32  # that share a power of two
POWER_OF_ONE = 127
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What 0 to 7 stand for. 8 to 15 are the same below 0."""


def read_mxfp4(_: Json) -> Quantization:
    """There is nothing to set."""
    scheme = Scheme(Layout.MXFP4, 4, Block(1, COLUMNS), is_float=True)
    return Quantization((Layout.MXFP4,), scheme)
