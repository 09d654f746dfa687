"""SentencePiece: a tokenizer.model, as LLaMA 1 and 2 and Mistral have it, becomes a tokenizer.json.

The file is a protocol buffer. Only the fields that decide how text is split are read. A model of
another kind than LLaMA's (BPE that falls back to bytes, no normalization) is an error that names
the difference.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from baton.checkpoints.tokenizer_json import Json, Vocabulary, added_token, cuts, tokenizer_json
from baton.errors import ModelError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's symbol for a space
BPE = 2
LONGEST_PIECE = 4096


class Kind(IntEnum):
    """The type of a piece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One token. Of two possible merges, the one with the higher score wins."""

    text: str
    score: float
    kind: Kind


class _Broken(Exception):
    """Not a protocol buffer, or not this one."""


def sentencepiece(path: Path, *, metaspace: str | None = None) -> Vocabulary:
    """The tokenizer in the file. A text begins with the beginning-of-text piece. Of a model that puts a
    space before a text, `metaspace` says where: None before the text and behind each special token in
    it, as SentencePiece itself does; "always" the same, but not before a space, and "first" only before
    the text, as transformers does for tokenizers that it calls legacy, and for others. Raises ModelError
    for another kind of tokenizer."""
    try:
        pieces, ids, leading_space = _pieces(path.read_bytes(), path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (_Broken, UnicodeDecodeError, struct.error, ValueError) as error:
        raise ModelError(f"{path} is not a SentencePiece model, or is broken") from error
    unknown, bos, _ = ids
    vocab: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if vocab.setdefault(piece.text, number) != number:
            raise ModelError(f"{path} has the piece {piece.text[:40]!r} twice")
    added = [
        added_token(piece.text, number, special=piece.kind is not Kind.USER_DEFINED)
        for number, piece in enumerate(pieces)
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ]
    return Vocabulary(
        tokenizer_json(
            vocab=vocab,
            merges=_merges(pieces),
            added=added,
            first=(pieces[bos].text, bos),
            steps=_steps(metaspace, leading=leading_space),
            model={
                "unk_token": pieces[unknown].text,
                "fuse_unk": True,
                "byte_fallback": True,
            },
        ),
        path,
    )


def _steps(metaspace: str | None, *, leading: bool) -> Json:
    """How spaces become SentencePiece's symbol, and back."""
    escape: list[Json] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    back: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if leading:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        escape.insert(0, {"type": "Prepend", "prepend": SPACE})
    theirs = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": metaspace,
        "split": False,
    }
    apart = leading and metaspace is not None
    return {
        "normalizer": None if apart else {"type": "Sequence", "normalizers": escape},
        "pre_tokenizer": theirs if apart else None,
        "decoder": {"type": "Sequence", "decoders": back},
    }


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every split of a piece into two others, in the order of preference."""
    place = {each.text: at for at, each in enumerate(pieces) if each.kind is Kind.NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(
        place, key=lambda text: -pieces[place[text]].score
    ):  # a stable sort: equal scores keep their order
        merges += cuts(text, place)
    return merges


def _pieces(data: bytes, path: Path) -> tuple[list[Piece], list[int], bool]:
    """All pieces; the ids for unknown text, beginning and end; does a text get a space before it?"""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(_bytes(value)))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise _Broken
    _refuse_other_kinds(pieces, trainer, normalizer, path)
    ids = [_signed(trainer.get(field, default)) for field, default in ((40, 0), (41, 1), (42, 2))]
    if not all(0 <= each < len(pieces) for each in ids):
        raise ModelError(
            f"{path} lacks a piece for unknown text, for the beginning or for the end of a text"
        )
    return pieces, ids, normalizer.get(3, 1) == 1


def _refuse_other_kinds(
    pieces: list[Piece],
    trainer: dict[int, int | bytes],
    normalizer: dict[int, int | bytes],
    path: Path,
) -> None:
    wrong = {
        "is not a BPE model": trainer.get(3, 1) != BPE,
        "does not fall back to bytes": trainer.get(35, 0) != 1
        or sum(piece.kind is Kind.BYTE for piece in pieces) != 256,
        "normalizes text by a table": bool(normalizer.get(2)),
        "removes spaces": normalizer.get(4, 1) != 0,
        "does not escape spaces": normalizer.get(5, 1) != 1,
        "puts spaces behind words": trainer.get(24, 0) != 0,
        "has unused pieces": any(piece.kind is Kind.UNUSED for piece in pieces),
        "has an empty piece": any(not piece.text for piece in pieces),
        "has a very long piece": any(len(piece.text) > LONGEST_PIECE for piece in pieces),
    }
    if why := [each for each, is_so in wrong.items() if is_so]:
        raise ModelError(
            f"{path} {', '.join(why)}: only SentencePiece models of LLaMA's kind are read; put a "
            "tokenizer.json beside it, or for LLaMA's own format use convert with --tokenizer FILE"
        )


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, Kind.NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = _bytes(value).decode()
        elif field == 2:
            score = float(struct.unpack("<f", _bytes(value))[0])
        elif field == 3 and isinstance(value, int):
            kind = Kind(value)
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind not in (1, 2, 5):
            raise _Broken
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        if at + size > len(data):
            raise _Broken
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in base 128, low digits first, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        digit = data[at]
        at += 1
        number |= (digit & 0x7F) << shift
        if digit < 0x80:
            return number, at
    raise _Broken


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Broken
    return value


def _signed(value: int | bytes | None) -> int:
    """An id. The file has 2**64 - 1 for -1 (none)."""
    if not isinstance(value, int):
        raise _Broken
    return value - (1 << 64) if value >= 1 << 63 else value
