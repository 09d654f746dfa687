"""Tokenizer: a GGUF file's vocabulary becomes tokenizer.json and tokenizer_config.json.

Two kinds are read. In `gpt2` tokens are bytes in GPT-2's letters, with a list of merges. In `llama`, of
SentencePiece, they are text with ▁ for a space and a score each: of two merges the one with the higher
score wins. Each token has a type, and control tokens and a user's own are matched before words are split.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from baton.errors import ModelError
from baton.gguf.header import Header, Value
from baton.gguf.pre_tokenizers import KINDS, PreTokenizer

Json = dict[str, Any]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
LONGEST_PIECE = 4096  # characters; each is tried as the end of a merge's first half
IN_ORDER = ("gemma", "gemma2", "gemma3")
"""Their merges follow the order of the tokens, not the scores, and no text begins with a space."""


class Kind(IntEnum):
    """The type of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_files(header: Header, bos: int | None, ends: Sequence[int]) -> dict[str, Json]:
    """The contents of tokenizer.json and tokenizer_config.json, by name. `bos` and `ends`: ids that begin
    and end a text; the first end is its eos. Raises ModelError for a tokenizer of another kind."""
    vocabulary = _Vocabulary(header)
    model = vocabulary.text("model")
    if model == "gpt2":
        body, begins = vocabulary.byte_level()
    elif model == "llama":
        body, begins = vocabulary.sentencepiece()
    else:
        raise vocabulary.refused(
            f"has a tokenizer of the kind {model[:40]!r}: gpt2 and llama are read"
        )
    before = [bos] if bos is not None and vocabulary.flag("add_bos_token", begins) else []
    after = [ends[0]] if ends and vocabulary.flag("add_eos_token", False) else []
    tokens = vocabulary.tokens
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added([*([] if bos is None else [bos]), *ends]),
        **body,
        "post_processor": _around(before, after, tokens),
    }
    settings: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else tokens[bos],
        "eos_token": tokens[ends[0]] if ends else None,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("unknown", "padding"):
        number = vocabulary.token_id(name)
        if number is not None:
            settings[f"{name[:3]}_token"] = tokens[number]
    if templates := _templates(header.values, header.path):
        settings["chat_template"] = templates
    return {"tokenizer.json": whole, "tokenizer_config.json": settings}


class _Vocabulary:
    def __init__(self, header: Header) -> None:
        self._header = header
        self.tokens = self._list("tokens", str)
        if not self.tokens:
            raise self.refused("has no tokens")
        self._check()
        self._kinds = [Kind.NORMAL] * len(self.tokens)
        if self._get("token_type") is not None:
            known = {int(kind) for kind in Kind}
            given = self._list("token_type", int, len(self.tokens))
            self._kinds = [Kind(each) if each in known else Kind.NORMAL for each in given]

    def _check(self) -> None:
        if max(map(len, self.tokens)) > LONGEST_PIECE:
            raise self.refused(f"has a token of more than {LONGEST_PIECE} characters")
        if (
            self._header.values.get("general.architecture") in IN_ORDER
        ):  # runs of spaces, as they are
            known = set(self.tokens)
            for number, text in enumerate(self.tokens):
                spaces = SPACE * len(text)
                if text and not text.strip(" ") and spaces not in known:
                    self.tokens[number] = spaces
        seen: dict[str, int] = {}
        for number, text in enumerate(self.tokens):
            if seen.setdefault(text, number) != number:
                raise self.refused(f"has the token {text[:40]!r} twice")

    def refused(self, why: str) -> ModelError:
        return ModelError(f"{self._header.path} {why}")

    def _get(self, name: str) -> Value | None:
        return self._header.values.get(f"{PREFIX}{name}")

    def text(self, name: str) -> str:
        found = self._get(name)
        if not isinstance(found, str):
            raise self.refused(f"has no {PREFIX}{name}")
        return found

    def flag(self, name: str, default: bool) -> bool:
        found = self._get(name)
        return default if found is None else bool(found)

    def token_id(self, name: str) -> int | None:
        """The id, or None if there is none in the vocabulary."""
        found = self._get(f"{name}_token_id")
        sound = isinstance(found, int) and not isinstance(found, bool)
        return int(found) if sound and 0 <= found < len(self.tokens) else None  # type: ignore[arg-type, operator]

    def _list(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        found = self._get(name)
        sound = isinstance(found, list) and all(isinstance(each, kind) for each in found)
        if not isinstance(found, list) or not sound or length not in (None, len(found)):
            wanted = "" if length is None else f" with one for each of {length:,} tokens"
            raise self.refused(f"has no list {PREFIX}{name}{wanted}")
        return found

    def added(self, more: Sequence[int]) -> list[Json]:
        """Tokens that are matched as a whole. `more`: control tokens whatever their type is."""
        special = {number for number, kind in enumerate(self._kinds) if kind is Kind.CONTROL} | set(
            more
        )
        own = {number for number, kind in enumerate(self._kinds) if kind is Kind.USER_DEFINED}
        if (unknown := self.token_id("unknown")) is not None:
            special.add(unknown)
        asis = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": self.tokens[number], **asis, "special": number in special}
            for number in sorted(special | own)
            if self.tokens[number] and (number in special or self.tokens[number].strip(SPACE))
        ]

    def byte_level(self) -> tuple[Json, bool]:
        """The sections of tokenizer.json, and whether a text begins with the beginning-of-text token."""
        name = self._get("pre") or ""
        known: PreTokenizer | None = KINDS.get(name) if isinstance(name, str) else None
        if known is None:
            raise self.refused(
                f"has tokenizer.ggml.pre {str(name)[:40]!r}: how that splits text into words is not "
                "known here"
            )
        merges = [tuple(each.split(" ")) for each in self._list("merges", str)]
        ids = {text: number for number, text in enumerate(self.tokens)}
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
                raise self.refused(
                    f"has the merge {' '.join(pair)[:40]!r}, which is none of its tokens"
                )
        level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        body = {
            "normalizer": None,
            "pre_tokenizer": known.json(),
            "decoder": level,
            "model": _bpe(ids, merges) | {"ignore_merges": known.whole_words},
        }
        return body, known.begins

    def sentencepiece(self) -> tuple[Json, bool]:
        in_order = self._header.values.get("general.architecture") in IN_ORDER
        spaced = not in_order and self.flag("add_space_prefix", True)
        unknown = self.token_id("unknown")
        back: list[Json] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if spaced:
            back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        ids = {text: number for number, text in enumerate(self.tokens)}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        first = "first" if spaced else "never"
        metaspace = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": first,
            "split": False,
        }
        body = {
            "normalizer": replace if in_order else None,
            "pre_tokenizer": None if in_order else metaspace,
            "decoder": {"type": "Sequence", "decoders": back},
            "model": _bpe(ids, self._merges(ids, in_order=in_order))
            | {
                "unk_token": None if unknown is None else self.tokens[unknown],
                "fuse_unk": True,
                "byte_fallback": True,
            },
        }
        return body, True

    def _merges(self, ids: Mapping[str, int], *, in_order: bool) -> list[tuple[str, str]]:
        """Every split of a token into two others, in the order of preference."""
        if self._get("merges") is not None:
            return [(left, right) for left, _, right in
                    (each.partition(" ") for each in self._list("merges", str))]  # fmt: skip
        if in_order:
            scores = [-number for number in range(len(ids))]
        else:
            scores = self._list("scores", float, len(self.tokens))
        mergeable = {
            text for text, kind in zip(self.tokens, self._kinds, strict=True)
            if kind in (Kind.NORMAL, Kind.USER_DEFINED)
        }  # fmt: skip
        found = []
        for text, score in zip(self.tokens, scores, strict=True):
            if text not in mergeable:
                continue
            cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
            both = [cut for cut in cuts if cut[0] in mergeable and cut[1] in mergeable]
            both.sort(key=lambda cut: (ids[cut[0]], ids[cut[1]]))
            found += [(-score, -len(left), left, right) for left, right in both]
        found.sort(key=lambda each: each[:2])
        return [(left, right) for _, _, left, right in found]


def _bpe(ids: Mapping[str, int], merges: Sequence[Sequence[str]]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(ids),
        "merges": [list(pair) for pair in merges],
    }


def _around(before: Sequence[int], after: Sequence[int], tokens: Sequence[str]) -> Json | None:
    """The section `post_processor`: the tokens before and after a text."""
    if not before and not after:
        return None

    def special(numbers: Sequence[int]) -> list[Json]:
        return [{"SpecialToken": {"id": tokens[each], "type_id": 0}} for each in numbers]

    def text(name: str) -> list[Json]:
        return [*special(before), {"Sequence": {"id": name, "type_id": 0}}, *special(after)]

    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": {
            tokens[each]: {"id": tokens[each], "ids": [each], "tokens": [tokens[each]]}
            for each in (*before, *after)
        },
    }


def _templates(values: Mapping[str, Value], path: Path) -> str | list[Json] | None:
    """The chat template, or several by name, as transformers stores them."""
    named = {
        key.removeprefix(f"{TEMPLATE}."): text
        for key, text in values.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    if (default := values.get(TEMPLATE)) is not None:
        named = {"default": default} | named
    if odd := [name for name, text in named.items() if not isinstance(text, str)]:
        raise ModelError(f"{path}: the chat template {odd[0][:40]!r} is not a text")
    if set(named) == {"default"}:
        return str(named["default"])
    return [{"name": name, "template": text} for name, text in named.items()] or None
