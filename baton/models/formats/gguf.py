"""GGUF: llama.cpp's format, written as a folder of transformers. Quantized weights become float32.

Serving needs no conversion: baton/gguf/ reads the same files when a model is loaded.
"""

from pathlib import Path

from baton.gguf.folder import contents, write_contents
from baton.gguf.weights import gguf_weights
from baton.models.formats.checkpoint import by_size, write_weights


def write_gguf(path: Path, out: Path) -> int:
    """Write everything into the folder `out`. Returns the number of tensors. Raises ModelError for a file
    that is not read."""
    write_contents(contents(path), out)
    return write_weights(by_size(gguf_weights(path)), out)
