"""Methods: what a folder says of its quantization, and which of the methods are read. No torch."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.checkpoints.families import text_part
from baton.checkpoints.jsonfile import Json, optional_object
from baton.errors import ModelError
from baton.quantized.awq import read_auto_round_awq, read_awq
from baton.quantized.compressed import read_compressed
from baton.quantized.fp8 import read_fp8
from baton.quantized.gptq import read_auto_round, read_gptq
from baton.quantized.mxfp4 import read_mxfp4
from baton.quantized.scheme import Quantization, Unread

FIELDS = ("quantization_config", "compression_config", "quantization")
"""Of config.json, or of its text_config."""
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote their settings before they were in config.json, too."""
COMPRESSED = "compressed-tensors"
READ: dict[str, Callable[[Json], Quantization]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    COMPRESSED: read_compressed,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "mxfp4": read_mxfp4,
}
ANOTHER = "use the same model in bf16, fp16 or fp32"


@dataclass(frozen=True, slots=True)
class Method:
    """A quantization that is read, and what to call it."""

    about: str  # such as: gptq, 4 bits
    quantization: Quantization
    settings: Json

    def digest(self) -> bytes:
        """Equal for equal settings, read by equal code."""
        found = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for source in sorted(Path(__file__).parent.glob("*.py")):
            found.update(source.read_bytes())
        return found.digest()


def method_of(name: str, config: Json) -> Method | None:
    """The quantization that config.json tells; None for a model in full width. ModelError, in one line,
    for one that is not read."""
    for place in (config, text_part(config)):
        for key in FIELDS:
            if found := place.get(key):
                return _read(name, key, found)
    return None


def method_beside(name: str, folder: Path) -> Method | None:
    """The quantization of a folder whose weights are quantized, and whose config.json tells none. None if
    no other file does. Raises ModelError."""
    for file, method in OWN_FILES.items():
        if found := optional_object(folder / file, f"{folder} is incomplete"):
            return _read(name, FIELDS[0], {"quant_method": method} | found)
    return None


def _read(name: str, key: str, found: Any) -> Method:
    about = how(key, found)
    method = _method(key, found)
    read = READ.get(method) if method else None
    if read is None:
        raise ModelError(f"{name} is quantized ({about}): {ANOTHER}")
    if method == "auto-round" and "awq" in str(found.get("packing_format")):
        read = read_auto_round_awq
    try:
        return Method(about, read(found), found)
    except Unread as why:
        raise ModelError(f"{name} is quantized ({about}), and {why}: {ANOTHER}") from why


def _method(key: str, found: Any) -> str | None:
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    if isinstance(method, str):
        return method
    return COMPRESSED if "config_groups" in found or key == FIELDS[1] else None


def how(key: str, found: Any) -> str:
    """The kind of quantization, and its bits where they are told."""
    if not isinstance(found, dict):
        return str(found)[:80]
    kind = _method(key, found)
    if kind is None:
        kind = "MLX" if key == "quantization" else None
        kind = kind or ("bitsandbytes" if _flagged(found) else "of an unknown kind")
    bits = _bits(found)
    return f"{kind[:80]}, {bits} bits" if bits else kind[:80]


def _flagged(found: Json) -> int | None:
    flags = (("load_in_4bit", 4), ("load_in_8bit", 8))
    return next((bits for key, bits in flags if found.get(key) is True), None)


def _bits(found: Json) -> int | None:
    if (flagged := _flagged(found)) is not None:
        return flagged
    for key in ("bits", "w_bit", "nbits"):
        if type(found.get(key)) is int and 0 < found[key] < 64:
            return int(found[key])
    return None
