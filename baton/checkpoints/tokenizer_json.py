"""tokenizer.json, the format of the `tokenizers` library, written from other formats' vocabularies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import AnyStr

from baton.checkpoints.jsonfile import Json

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's symbol for a space
LONGEST_TOKEN = 4096
"""Characters or bytes. Each is tried as the end of a merge's first half."""


class Kind(IntEnum):
    """The type of a token, by the numbers of SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The content of tokenizer.json, and the file it was made from."""

    json: Json
    source: Path

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        vocab = self.json["model"]["vocab"]
        return max([*vocab.values(), *self.special_ids().values()], default=-1) + 1

    def special_ids(self) -> dict[str, int]:
        """Ids of the added tokens by their text."""
        return {each["content"]: each["id"] for each in self.json["added_tokens"]}


def cuts(token: AnyStr, ranks: Mapping[AnyStr, int]) -> list[tuple[AnyStr, AnyStr]]:
    """Every split of the token into two others, those of the lowest ranks first."""
    both = [(token[:at], token[at:]) for at in range(1, len(token))]
    known = [(left, right) for left, right in both if left in ranks and right in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: Latin-1's own where it is visible, else one from 256 upwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


# ---- sections


def added_token(text: str, number: int, *, special: bool = True) -> Json:
    """A token that is matched in the text before it is split into words."""
    asis = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **asis, "special": special}


def bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **more: object) -> Json:
    """The section `model`. `more`: what differs from a plain BPE, such as `byte_fallback`."""
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return plain | more | {"vocab": dict(vocab), "merges": [list(pair) for pair in merges]}


def from_spaces() -> Json:
    """A normalizer: spaces to SentencePiece's symbol."""
    return {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def metaspace(scheme: str) -> Json:
    """A pre-tokenizer: the same, and where a text gets a space before it ("first", "always", "never")."""
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def to_spaces(*, leading: bool) -> Json:
    """The section `decoder`: SentencePiece's symbol to spaces, and bytes to characters. `leading`: a text
    begins with a space that was not in it."""
    back: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if leading:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": back}


def around(before: Mapping[str, int], after: Mapping[str, int]) -> Json:
    """The section `post_processor`: the tokens that begin and end every text, with their ids."""

    def special(tokens: Mapping[str, int]) -> list[Json]:
        return [{"SpecialToken": {"id": each, "type_id": 0}} for each in tokens]

    def text(name: str) -> list[Json]:
        return [*special(before), {"Sequence": {"id": name, "type_id": 0}}, *special(after)]

    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": {
            each: {"id": each, "ids": [number], "tokens": [each]}
            for each, number in {**before, **after}.items()
        },
    }


def tokenizer_json(
    *, added: Sequence[Json], steps: Json, post_processor: Json | None, model: Json
) -> Json:
    """The whole file. `steps`: its sections `normalizer`, `pre_tokenizer` and `decoder`."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        **steps,
        "post_processor": post_processor,
        "model": model,
    }
