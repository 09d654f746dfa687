"""Tiny checkpoints as nanochat and LLaMA write them, and what each of these computes.

The forwards are written from the published definitions, one sequence at a time and in no hurry:
LLaMA's rope is a product of complex numbers, nanochat's turns two halves the other way round.
"""

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]

WORDS = [b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b" a", b"an", b"\xc3\xbc"]
RANKS = {bytes([byte]): byte for byte in range(256)} | {
    word: 256 + place for place, word in enumerate(WORDS)
}
CHAT = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head] of each, fewer heads of k and v: causal attention, [tokens, width]."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    late = torch.ones(len(q), len(q)).triu(1).bool()
    weights = scores.masked_fill(late, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


# ---- nanochat

NANOCHAT: Json = dict(sequence_len=64, vocab_size=275, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)


def nanochat_tensors(*, rows: int = 275, dtype: torch.dtype = torch.float32) -> Tensors:
    width, keys = 32, 16
    inner = {
        "attn.c_q": (width, width), "attn.c_k": (keys, width), "attn.c_v": (keys, width),
        "attn.c_proj": (width, width), "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }  # fmt: skip
    shapes = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)} | {
        f"transformer.h.{n}.{name}.weight": of for n in range(3) for name, of in inner.items()
    }
    tensors = random_tensors(shapes)
    tensors["lm_head.weight"] *= 5  # logits that feel the cap
    return {name: each.to(dtype) for name, each in tensors.items()}


def write_nanochat(
    folder: Path,
    tensors: Tensors | None = None,
    *,
    step: int = 650,
    special: Sequence[str] = CHAT,
    **config: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors or nanochat_tensors(), folder / f"model_{step:06d}.pt")
    meta = {"step": step, "model_config": NANOCHAT | config, "device_batch_size": 32}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    numbered = {text: len(RANKS) + at for at, text in enumerate(special)}
    (folder / "tokenizer.pkl").write_bytes(encoding_file(RANKS, numbered, SPLIT))
    return folder


def nanochat_logits(tensors: Tensors, ids: Sequence[int], vocabulary: int = 275) -> torch.Tensor:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],))

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        speeds = 10000.0 ** -(torch.arange(half) / half)
        angles = torch.outer(torch.arange(len(x)).float(), speeds)[:, None]
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    x = norm(tensors["transformer.wte.weight"][list(ids)].float())
    for layer in range(3):
        own = {
            name.removeprefix(f"transformer.h.{layer}."): each.float()
            for name, each in tensors.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        q, k, v = (
            F.linear(norm(x), own[f"attn.c_{each}.weight"]).unflatten(1, (-1, 8)) for each in "qkv"
        )
        x = x + F.linear(attend(norm(turn(q)), norm(turn(k)), v), own["attn.c_proj.weight"])
        inside = F.linear(norm(x), own["mlp.c_fc.weight"]).relu().square()
        x = x + F.linear(inside, own["mlp.c_proj.weight"])
    logits = F.linear(norm(x), tensors["lm_head.weight"].float())[:, :vocabulary]
    return 15 * torch.tanh(logits / 15)


# ---- LLaMA

LLAMA: Json = dict(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=-1, multiple_of=16,
    ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=500000.0,
)  # fmt: skip
INSIDE = 112  # int(1.3 * int(2 * 4 * 32 / 3)) = 110, up to a multiple of 16
ROWS = 284  # of RANKS and 18 special tokens
COLUMNS = ("wo.weight", "w2.weight")
ALONE = ("norm.weight", "rope.freqs")


def llama_tensors(rows: int = ROWS, *, tied: bool = False, inside: int = INSIDE) -> Tensors:
    inner = {
        "attention.wq": (32, 32), "attention.wk": (16, 32), "attention.wv": (16, 32),
        "attention.wo": (32, 32), "feed_forward.w1": (inside, 32), "feed_forward.w2": (32, inside),
        "feed_forward.w3": (inside, 32), "attention_norm": (32,), "ffn_norm": (32,),
    }  # fmt: skip
    shapes: dict[str, Sequence[int]] = {
        "tok_embeddings.weight": (rows, 32), "norm.weight": (32,), "output.weight": (rows, 32),
    }  # fmt: skip
    shapes |= {f"layers.{n}.{name}.weight": of for n in range(2) for name, of in inner.items()}
    tensors = random_tensors(shapes)
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    return tensors


def cut(tensors: Tensors, parts: int, *, embedding: int) -> list[Tensors]:
    """The tensors as so many GPUs would hold them; `embedding`: along which dimension its is cut."""
    files: list[Tensors] = [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        along = embedding if name.startswith("tok_") else int(name.endswith(COLUMNS))
        pieces = [tensor] * parts if name.endswith(ALONE) else tensor.chunk(parts, along)
        for file, piece in zip(files, pieces, strict=True):
            file[name] = piece.clone()
    return files


def write_llama(
    folder: Path,
    tensors: Tensors | None = None,
    *,
    parts: int = 1,
    embedding: int = 0,
    vocabulary: bytes | None = None,
    leave_out: Sequence[str] = (),
    **params: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for at, each in enumerate(cut(tensors or llama_tensors(), parts, embedding=embedding)):
        torch.save(each, folder / f"consolidated.{at:02d}.pth")
    said = {name: value for name, value in (LLAMA | params).items() if name not in leave_out}
    (folder / "params.json").write_text(json.dumps(said))
    (folder / "tokenizer.model").write_bytes(vocabulary or tiktoken_list())
    return folder


def llama_logits(
    tensors: Tensors, ids: Sequence[int], *, theta: float, factor: float | None = None
) -> torch.Tensor:
    """`factor`: LLaMA 3.1's slowing of the slow rotations."""
    speeds = [theta ** -(place / 8) for place in range(0, 8, 2)]
    if factor is not None:
        speeds = [slowed(speed, factor) for speed in speeds]
    angles = torch.outer(torch.arange(len(ids)).float(), torch.tensor(speeds))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = tensors["tok_embeddings.weight"][list(ids)].float()
    for layer in range(2):
        own = {
            name.removeprefix(f"layers.{layer}."): each.float()
            for name, each in tensors.items()
            if name.startswith(f"layers.{layer}.")
        }
        y = norm(x, own["attention_norm.weight"])
        q, k, v = (F.linear(y, own[f"attention.w{e}.weight"]).unflatten(1, (-1, 8)) for e in "qkv")
        x = x + F.linear(attend(turn(q), turn(k), v), own["attention.wo.weight"])
        y = norm(x, own["ffn_norm.weight"])
        gate, up = (F.linear(y, own[f"feed_forward.w{each}.weight"]) for each in (1, 3))
        x = x + F.linear(F.silu(gate) * up, own["feed_forward.w2.weight"])
    return F.linear(norm(x, tensors["norm.weight"]), tensors["output.weight"])


def slowed(speed: float, factor: float) -> float:
    """A rotation's speed in LLaMA 3.1: waves up to 2,048 tokens as they were, from 8,192 on slower
    by the factor, in between a mixture of both by how often they fit into 8,192."""
    wave = 2 * math.pi / speed
    if wave < 8192 / 4:
        return speed
    if wave > 8192:
        return speed / factor
    share = (8192 / wave - 1) / (4 - 1)
    return (1 - share) * speed / factor + share * speed


# ---- tokenizers
def tiktoken_list(ranks: Mapping[bytes, int] = RANKS) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def encoding_file(ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str) -> bytes:
    """What Python's pickling makes of a tiktoken Encoding; every instruction written out."""

    def text(value: str) -> bytes:
        data = value.encode()
        short = len(data) < 256
        length = struct.pack("<B" if short else "<I", len(data))
        return (b"\x8c" if short else b"X") + length + data + b"\x94"

    def number(value: int) -> bytes:
        return b"K%c" % value if value < 256 else b"M" + struct.pack("<H", value)

    def table(entries: Sequence[bytes]) -> bytes:
        return b"}\x94(" + b"".join(entries) + b"u"

    tokens = [b"C%c%s\x94" % (len(token), token) + number(rank) for token, rank in ranks.items()]
    others = [text(name) + number(place) for name, place in special.items()]
    state = [
        text("name") + text("rustbpe"),
        text("pat_str") + text(pattern),
        text("mergeable_ranks") + table(tokens),
        text("special_tokens") + table(others),
    ]
    named = text("tiktoken.core") + text("Encoding") + b"\x93\x94)\x81\x94"
    body = named + table(state) + b"b."
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def varint(value: int) -> bytes:
    digits = b""
    while value >= 0x80:
        digits += bytes([value & 0x7F | 0x80])
        value >>= 7
    return digits + bytes([value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
PIECES = [SPACE + "t", "he", SPACE + "the", "in", SPACE + "a", "ing", "an", SPACE + SPACE]
LETTERS = [SPACE, *"etaoinshrdlucgmü"]
Piece = tuple[str, float, int]


def pieces() -> list[Piece]:
    """Text, score and kind, in LLaMA's order: special tokens, bytes, merges, letters."""
    words = [(text, -float(at), 1) for at, text in enumerate(PIECES)]
    letters = [(text, -float(len(PIECES) + at), 1) for at, text in enumerate(LETTERS)]
    raw = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *raw, *words, *letters]


def sentencepiece_model(
    found: Sequence[Piece] | None = None,
    trainer: Mapping[int, int] | None = None,
    normalizer: Mapping[int, int | bytes | str] | None = None,
) -> bytes:
    made = b"".join(
        field(1, field(1, text) + field(2, score) + (field(3, kind) if kind != 1 else b""))
        for text, score, kind in found or pieces()
    )
    training = {3: 2, 35: 1, **(trainer or {})}
    normal: dict[int, int | bytes | str] = {1: "identity", 3: 1, 4: 0, **(normalizer or {})}
    for number, fields in ((2, training), (3, normal)):
        made += field(number, b"".join(field(each, value) for each, value in fields.items()))
    return made
