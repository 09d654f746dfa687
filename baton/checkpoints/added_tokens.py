"""Vocabulary: the tokenizer of a folder, as transformers puts it together from several files.

    tokenizer.json            the tokens, and most of the added ones
    tokenizer_config.json     special tokens by name (eos_token, ...), added ones (added_tokens_decoder)
    special_tokens_map.json   special tokens by name        } of older folders, read only if there
    added_tokens.json         added tokens with their ids   } is no added_tokens_decoder

A token that stands beside tokenizer.json only is added to it, or it would be split. transformers gives
it the next free id, whatever id the file names, and so do we.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from baton.checkpoints.jsonfile import optional_object
from baton.checkpoints.vocabulary import ADDED, NAMED, SETTINGS, why_unread
from baton.errors import ModelError

STANDARD = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
EXTRA, EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass(frozen=True, slots=True)
class TokensBeside:
    """What the files beside a tokenizer.json say about its tokens."""

    named: Mapping[str, Token]  # eos_token and the like
    extra: tuple[Token, ...]  # special ones without a name
    added: Mapping[int, AddedToken]  # by the id that the file gives them
    older: bool  # of an older folder: under an id of both, tokenizer.json's is meant
    split_special: bool  # special tokens in a text are split like any other text

    @property
    def texts(self) -> dict[str, str]:
        """The named ones, as chat templates know them."""
        return {name: _text(token) for name, token in self.named.items()}


def tokens_beside(folder: Path) -> TokensBeside:
    """Raises ModelError for a file that cannot be read."""
    where = folder / SETTINGS
    about = _object_in(where)
    if not about.get(EXTRA):
        about[EXTRA] = about.pop(EXTRA_BEFORE, None)
    split, listed = about.get("split_special_tokens") is True, about.get("added_tokens_decoder")
    if listed is not None:
        added = {_id(key, where): _token(each, where) for key, each in _object(listed, where)}
        return TokensBeside(*_named(about, where), added, older=False, split_special=split)
    file = folder / NAMED
    extra = about[EXTRA]
    about |= {key: _special(each, file) for key, each in _object_in(file).items()}
    if isinstance(extra, list) and isinstance(about[EXTRA], list):
        about[EXTRA] = [*extra, *(each for each in about[EXTRA] if each not in extra)]
    added = _added_before(folder / ADDED, *_named(about, where))
    about[EXTRA] = about[EXTRA] or about.get(EXTRA_BEFORE)
    return TokensBeside(*_named(about, where), added, older=True, split_special=split)


def _added_before(
    file: Path, named: Mapping[str, Token], extra: Sequence[Token]
) -> dict[int, AddedToken]:
    """Those of an added_tokens.json: texts and ids."""
    special = {_text(token) for token in (*map(named.get, STANDARD), *extra) if token is not None}
    return {
        _id(index, file): AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in _object_in(file).items()
    }


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer with all its tokens."""

    tokenizer: Tokenizer
    file: Path
    changed: bool  # there is more than in tokenizer.json
    end_id: int | None  # of its eos_token, with which a chat ends, too

    def json(self) -> str:
        """As a tokenizer.json would hold it."""
        return self.tokenizer.to_str() if self.changed else self.file.read_text(encoding="utf-8")


def read_vocabulary(file: Path) -> Vocabulary:
    """The tokenizer.json `file` with the tokens that stand beside it. Raises ModelError."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(why_unread(file, error)) from error
    beside = tokens_beside(file.parent)
    missing = _missing(tokenizer, beside)
    if missing:
        tokenizer.add_tokens(missing)
    if beside.split_special:
        tokenizer.encode_special_tokens = True
    end = beside.texts.get("eos_token")
    end_id = None if end is None else tokenizer.token_to_id(end)
    return Vocabulary(tokenizer, file, bool(missing), end_id)


def _missing(tokenizer: Tokenizer, beside: TokensBeside) -> list[AddedToken]:
    """What transformers adds: added tokens that are not there just so, and special ones that are no
    added tokens, even if the vocabulary has their text."""
    there = tokenizer.get_added_tokens_decoder()
    added = {**beside.added, **there} if beside.older else beside.added
    as_they_are = {repr(token) for token in there.values()}
    missing = [
        token
        for _, token in sorted(added.items(), key=itemgetter(0))
        if repr(token) not in as_they_are
    ]
    known = {token.content for token in (*there.values(), *missing)}
    named = {_text(token) for token in beside.named.values()}
    for token in (*beside.named.values(), *beside.extra):
        if _text(token) not in known:
            known.add(_text(token))
            missing.append(token if isinstance(token, AddedToken) else _special_token(token))
    for token in missing:
        token.special = token.special or token.content in named
    return [token for token in missing if token.content]


# ---- the files


def _object_in(file: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises ModelError."""
    return optional_object(file, f"{file.parent} is incomplete")


def _named(about: Mapping[str, Any], where: Path) -> tuple[dict[str, Token], tuple[Token, ...]]:
    """The special tokens with a name, and those without, in the order in which transformers adds them."""
    found = {key: value for key in about if (value := _any_token(about[key], where)) is not None}
    names = [name for name in STANDARD if name in found]
    others = [name for name in found if name.endswith("_token") and name not in STANDARD]
    names += sorted(others, key=lambda name: isinstance(about[name], str))  # objects go first
    named = {name: found[name] for name in names}
    unnamed = about.get(EXTRA)
    if isinstance(unnamed, dict):
        pairs = ((key, _any_token(value, where)) for key, value in unnamed.items())
        return named | {key: token for key, token in pairs if token is not None}, ()
    given = unnamed if isinstance(unnamed, list) else []
    tokens = [
        _any_token({"special": True, **each} if isinstance(each, dict) else each, where)
        for each in given
    ]
    return named, tuple(token for token in tokens if token is not None)


def _any_token(value: Any, where: Path) -> Token | None:
    """A text, or an object with a content; None if it is neither."""
    if isinstance(value, str | AddedToken):
        return value or None
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return _token(value, where)
    return None


def _token(value: Any, where: Path) -> AddedToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ModelError(f"{where}: an added token must be an object with a content, got {value!r}")
    return AddedToken(
        value["content"], **{flag: value[flag] is True for flag in FLAGS if flag in value}
    )


def _special(value: Any, where: Path) -> Any:
    """A value of special_tokens_map.json: all that it names is special."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return value
    return _token({**value, "special": True}, where)


def _special_token(text: str) -> AddedToken:
    return AddedToken(text, special=True)


def _object(value: Any, where: Path) -> Any:
    if not isinstance(value, dict):
        raise ModelError(f"{where}: added tokens must be an object, got {type(value).__name__}")
    return value.items()


def _id(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: the id of an added token must be a number, got {value!r}"
        ) from error


def _text(token: Token) -> str:
    return token.content if isinstance(token, AddedToken) else token
