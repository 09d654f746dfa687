"""JSON files of a model folder, read within bounds, and what a file is that is not what its name says."""

import json
from pathlib import Path
from typing import Any

from baton.errors import ModelError

Json = dict[str, Any]

LARGEST = 256 << 20  # bytes; the index of a model of 10,000 shards has 50 MB
DEEPEST = 64
"""Objects and arrays within each other. transformers copies them recursively, so Python's own limit is
too late."""
HEAD = 512  # bytes that say what a file is
GGML = "a GGML file, older than GGUF"
BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull` in its folder)"),
    (b"GGUF", "a GGUF file"),
    *((magic, GGML) for magic in (b"lmgg", b"fmgg", b"tjgg")),
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickles are"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page, or another XML file"),
)


def parse_json(path: Path) -> Any:
    """The content of a JSON file. OSError, or ValueError with a reason in one line."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    try:
        found = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(_too_deep()) from None
    except ValueError as error:
        what = what_it_is(data[:HEAD])
        raise ValueError(f"it is {what}" if what else f"it is not JSON: {error}") from error
    _check_depth(found)
    return found


def read_object(path: Path, what: str) -> Json:
    """The JSON object in `path`. Raises ModelError, in which `what` says what the file is needed for."""
    try:
        found = parse_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"{what}: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{what}: {path.name} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{what}: {path.name} must hold a JSON object, not {_kind(found)}")
    return found


def optional_object(path: Path, what: str) -> Json:
    """The same; empty if there is no such file."""
    return read_object(path, what) if path.exists() or path.is_symlink() else {}


def write_json(path: Path, content: Json, *, indent: int = 2) -> None:
    """Write an object as people read it. Raises OSError."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def what_it_is(head: bytes) -> str | None:
    """What a file is that begins with these bytes; None if that is unknown."""
    if not head:
        return "empty"
    start = head.lstrip().lower() if head.lstrip()[:1] == b"<" else head
    return next((what for begin, what in BEGINNINGS if start.startswith(begin)), None)


def head_of(path: Path) -> bytes:
    """The first bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        return file.read(HEAD)


def reason(error: Exception, longest: int = 300) -> str:
    """An exception in one line; an OSError without the path, which the message around it names."""
    text = getattr(error, "strerror", None) or str(error)
    line = " ".join(str(text).split()) or type(error).__name__
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(_too_deep())


def _inside(outer: Any) -> list[Any]:
    """The values in an object or array."""
    if isinstance(outer, dict):
        return list(outer.values())
    return outer if isinstance(outer, list) else []


def _too_deep() -> str:
    return f"it has more than {DEEPEST} objects or arrays within each other"


def _kind(found: Any) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(found), "a number")
