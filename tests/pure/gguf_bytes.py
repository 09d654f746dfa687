"""GGUF files byte by byte, so that each byte can be wrong. Needs no package."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LETTERS = [chr(byte) for byte in range(0x21, 0x7F)]
ROWS = len(LETTERS) + 2
WIDTH, INSIDE = 32, 64
SIZES = {
    "context_length": 64,
    "block_count": 1,
    "embedding_length": WIDTH,
    "feed_forward_length": INSIDE,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    **{f"llama.{name}": value for name, value in SIZES.items()},
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["<|end|>", *LETTERS, "ab"],
    "tokenizer.ggml.token_type": [3] + [1] * (ROWS - 1),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}
SHAPES = {
    "token_embd.weight": (ROWS, WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    **{f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
    "blk.0.ffn_gate.weight": (INSIDE, WIDTH),
    "blk.0.ffn_up.weight": (INSIDE, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, INSIDE),
}
F32, Q8_0 = 0, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(value: Any) -> bytes:
    """Type and value."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case bytes():  # as it is
            return value
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case [float(), *_]:
            return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def gguf(
    values: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    kind: int = F32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """The file, with zeros for weights. A value of None is left out."""
    kept = {key: each for key, each in (VALUES | dict(values or {})).items() if each is not None}
    shapes = SHAPES if shapes is None else shapes
    number, count = counts or (len(shapes), len(kept))
    made = b"GGUF" + struct.pack("<IQQ", version, number, count)
    for key, value in kept.items():
        made += text(key) + packed(value)
    end = 0
    for name, shape in shapes.items():
        place = (offsets or {}).get(name, end)
        made += text(name) + struct.pack("<I", len(shape))
        made += b"".join(struct.pack("<Q", each) for each in reversed(shape))
        made += struct.pack("<IQ", kind, place)
        size = 4
        for each in shape:
            size *= each
        end += -(-size // alignment) * alignment
    return made + bytes(-len(made) % alignment + min(end, 1 << 20))


def write(path: Path, made: bytes) -> Path:
    path.write_bytes(made)
    return path
