"""Byte-level BPE: token bytes and their ranks, as tiktoken stores them, become a tokenizer.json.

tiktoken merges the neighbours whose joint bytes have the lowest rank. tokenizer.json lists pairs to
merge, so every split of a token into two others is listed, in the order of the tokens' ranks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import AnyStr

from baton.errors import ModelError
from baton.models.formats.checkpoint import Json, Vocabulary

LONGEST_TOKEN = 4096  # bytes; a cut at each is tried


def byte_level(
    ranks: Mapping[bytes, int],
    special: Mapping[str, int],
    pattern: str,
    bos: str,
    source: Path,
) -> Vocabulary:
    """The tokenizer of these tokens. `pattern` splits text into words; a text begins with `bos`."""
    used = sorted([*ranks.values(), *special.values()])
    if used != list(range(len(used))):
        raise ModelError(f"{source}: token ids must run from 0 without a gap, each used once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{source} has no token for the byte {missing[0]:#04x}")
    if max(map(len, ranks)) > LONGEST_TOKEN:
        raise ModelError(f"{source} has a token of more than {LONGEST_TOKEN} bytes")
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    in_order = sorted(ranks, key=ranks.__getitem__)
    merges = [
        [spelled[left], spelled[right]] for token in in_order for left, right in cuts(token, ranks)
    ]
    words = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return Vocabulary(
        tokenizer_json(
            vocab={spelled[token]: ranks[token] for token in in_order},
            merges=merges,
            added=[added_token(text, number) for text, number in special.items()],
            first=(bos, special[bos]),
            steps={
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [words, level | {"use_regex": False}],
                },
                "decoder": level | {"use_regex": True},
            },
            model={"ignore_merges": True},  # a whole word that is a token needs no merging
        ),
        source,
    )


def cuts(token: AnyStr, ranks: Mapping[AnyStr, int]) -> list[tuple[AnyStr, AnyStr]]:
    """Every split of the token into two others, those of the lowest ranks first."""
    both = [(token[:at], token[at:]) for at in range(1, len(token))]
    known = [(left, right) for left, right in both if left in ranks and right in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_letters() -> dict[int, str]:
    """A visible letter for each byte: Latin-1's own where it has one, else one from 256 upwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


def added_token(text: str, number: int, *, special: bool = True) -> Json:
    """A token that is matched in the text before it is split into words."""
    asis = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **asis, "special": special}


def tokenizer_json(
    *,
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Sequence[Json],
    first: tuple[str, int],
    steps: Json,
    model: Json,
) -> Json:
    """The whole file, for any kind of BPE. `first`: token and id that begin every text."""
    text, number = first
    begin = {"SpecialToken": {"id": text, "type_id": 0}}
    first_text, second_text = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        **steps,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first_text],
            "pair": [begin, first_text, begin, second_text],
            "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
        },
        "model": bpe | model | {"vocab": dict(vocab), "merges": [list(pair) for pair in merges]},
    }
