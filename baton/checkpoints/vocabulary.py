"""The tokenizer of a model folder: its tokenizer.json, or one that is made from its tokenizer.model.

What is made is kept in the user's cache, under a hash of all that it was made from, so each process
finds the same file and only the first one takes the second or two to write it.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import Any

from baton.checkpoints.jsonfile import (
    LARGEST,
    Json,
    head_of,
    optional_object,
    parse_json,
    reason,
    what_it_is,
)
from baton.checkpoints.sentencepiece import sentencepiece
from baton.checkpoints.tokenizer_json import added_token
from baton.errors import ModelError
from baton.package import COMMAND

SENTENCEPIECE = ("tokenizer.model", "spiece.model")
CONVERTED = ("vocab.json", "vocab.txt", "merges.txt")
"""From these `convert` makes a tokenizer.json, with transformers, which is not imported here."""
UNREAD = ("tekken.json", "qwen.tiktoken", "tokenizer.tiktoken", "vocab.tiktoken", "tiktoken.model")
SETTINGS, ADDED, NAMED = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
READER = 1  # to be raised when the same files would give another tokenizer.json
LARGEST_ID = 1 << 24


def tokenizer_of(folder: Path) -> Path:
    """The tokenizer.json that belongs to a folder. Raises ModelError."""
    own = folder / "tokenizer.json"
    if own.exists() or own.is_symlink():
        _check(own)
        return own
    for name in SENTENCEPIECE:
        if (folder / name).exists():
            return _made(folder / name)
    if any((folder / name).exists() for name in CONVERTED):
        raise ModelError(
            f"{folder} has no tokenizer.json: run {COMMAND} convert {quote(str(folder))} OUT and use "
            "OUT, which gets one made from the vocabulary there"
        )
    if unread := [name for name in UNREAD if (folder / name).exists()]:
        raise ModelError(
            f"{folder} has no tokenizer.json, and {unread[0]} is of a kind that is not read: fetch "
            "tokenizer.json from the model's publisher, or from another copy of the model"
        )
    raise ModelError(
        f"{folder} has no tokenizer: tokenizer.json is missing, and tokenizer.model and vocab.json, "
        "from which it could be made, are too; fetch the model again"
    )


def _check(path: Path) -> None:
    """ModelError if the file is certainly no JSON object. Reading all of it takes half a second."""
    try:
        head = head_of(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}") from error
    if not head.lstrip().startswith(b"{"):
        what = what_it_is(head) or "not a JSON object"
        raise ModelError(f"{path} is {what}, not a tokenizer: fetch it again")


def why_unread(path: Path, error: Exception) -> str:
    """What to say of a tokenizer.json that the tokenizers library does not read, with its reason."""
    try:
        found = parse_json(path)
    except (OSError, ValueError) as broken:
        return f"{path} is broken, {reason(broken)}: fetch it again"
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        return f"{path} is not a tokenizer.json: it has no model; fetch it again"
    try:
        installed = version("tokenizers")
    except PackageNotFoundError:
        installed = "of this installation"
    return (
        f"{path} is not read by tokenizers {installed}: it was made by a newer version (then update "
        f"tokenizers), or is damaged (then fetch it again); it says: {reason(error)}"
    )


# ---- made from SentencePiece's model


def made_from(path: Path) -> Json:
    """The tokenizer.json of a tokenizer.model and the settings beside it, as transformers builds it.
    Raises ModelError."""
    settings = optional_object(path.parent / NAMED, f"{path.parent} is incomplete")
    settings |= optional_object(path.parent / SETTINGS, f"{path.parent} is incomplete")
    made = sentencepiece(path, metaspace="always" if settings.get("legacy") is True else "first")
    tokenizer = made.json
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {str(each["content"]): each for each in tokenizer["added_tokens"]}
    for content, number, flags in _added(path.parent, settings):
        if vocab.setdefault(content, number) != number:
            raise ModelError(
                f"{path.parent} gives the token {content[:40]!r} two ids, {vocab[content]} in "
                f"{path.name} and {number}: its tokenizer files are of different models"
            )
        added[content] = added_token(content, number) | flags
    tokenizer["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
    _set_ends(tokenizer, settings, path)
    return tokenizer


def _added(folder: Path, settings: Json) -> list[tuple[str, int, Json]]:
    """Text, id and flags of the tokens that were added to the vocabulary, by id."""
    found: dict[int, tuple[str, int, Json]] = {}
    extra = optional_object(folder / ADDED, f"{folder} is incomplete")
    decoder = settings.get("added_tokens_decoder") or {}
    entries: list[tuple[Any, Any, Json]] = [(text, number, {}) for text, number in extra.items()]
    for number, each in decoder.items() if isinstance(decoder, dict) else ():
        known = each if isinstance(each, dict) else {}
        flags = {name: known[name] for name in _FLAGS if isinstance(known.get(name), bool)}
        entries.append((known.get("content"), number, flags))
    for text, number, flags in entries:
        id_ = int(number) if str(number).isdecimal() and len(str(number)) < 12 else -1
        if not isinstance(text, str) or not text or not 0 <= id_ < LARGEST_ID:
            raise ModelError(
                f"{folder}: the added token {str(text)[:40]!r} must have a text and an id below "
                f"{LARGEST_ID:,}, got {str(number)[:40]!r}"
            )
        found[id_] = (text, id_, flags)
    return [found[each] for each in sorted(found)]


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _set_ends(tokenizer: Json, settings: Json, path: Path) -> None:
    """Begin each text with the token for that, or not, and end it with the other, as the settings say."""
    vocab, process = tokenizer["model"]["vocab"], tokenizer["post_processor"]
    bos = _text(settings.get("bos_token")) or process["single"][0]["SpecialToken"]["id"]
    eos = _text(settings.get("eos_token"))
    begin = [bos] if settings.get("add_bos_token", True) is not False else []
    end = [eos] if settings.get("add_eos_token") is True and eos is not None else []
    for each in (*begin, *end):
        if each not in vocab:
            raise ModelError(
                f"{path.parent}: {SETTINGS} names {each[:40]!r}, which is no token of {path.name}"
            )
    first, second = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
    before, after = (
        [{"SpecialToken": {"id": each, "type_id": 0}} for each in side] for side in (begin, end)
    )
    process["single"] = [*before, first, *after]
    process["pair"] = [*before, first, *after, *before, second, *after]
    process["special_tokens"] = {
        each: {"id": each, "ids": [vocab[each]], "tokens": [each]} for each in (*begin, *end)
    }


def _text(token: Any) -> str | None:
    """A special token is a text, or an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _made(source: Path) -> Path:
    """The tokenizer.json in the cache, written now if it is not there, with copies of the files that say
    more about its tokens beside it."""
    digest = hashlib.sha256(f"{READER} {source.name}".encode())
    contents: dict[str, bytes] = {}
    for path in (source, *(source.parent / name for name in (SETTINGS, ADDED, NAMED))):
        try:
            if path.exists() and path.stat().st_size > LARGEST:
                raise ModelError(f"{path} is larger than {LARGEST >> 20} MiB: it is no tokenizer")
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {reason(error)}") from error
        digest.update(f" {len(data)} ".encode() + data)
        if data and path != source:
            contents[path.name] = data
    try:
        made = _cache() / digest.hexdigest()[:32]
        if not made.exists():
            text = json.dumps(made_from(source), ensure_ascii=False)
            _write(made, contents | {"tokenizer.json": text.encode()})
    except OSError as error:
        raise ModelError(
            f"the tokenizer.json made from {source} cannot be kept: {reason(error)}; set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return made / "tokenizer.json"


def _cache() -> Path:
    """The folder, which only its owner can write to. Raises OSError."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "baton" / "tokenizers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(0, f"{folder} is writable by other users")
    return folder


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder at once: other processes see all of it or nothing."""
    part = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".part"))
    try:
        for name, data in contents.items():
            (part / name).write_bytes(data)
        os.rename(part, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # or another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
