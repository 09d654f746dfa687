"""tokenizer.json, the format of the `tokenizers` library, written from other formats' vocabularies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, AnyStr

Json = dict[str, Any]


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
