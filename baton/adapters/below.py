"""Folders that clients may name: those below one folder, which --allow-lora-updates names.

A client's path is relative to that folder, or an absolute path within it. What leads out of it is
refused before any file is looked at, and so is a link that does: no answer tells what is elsewhere.
"""

from collections.abc import Iterator
from pathlib import Path

from baton.adapters.changes import LONGEST_PATH
from baton.adapters.files import CONFIG, WEIGHTS, AdapterFiles, read_adapter
from baton.adapters.identity import Adapter
from baton.checkpoints.jsonfile import reason
from baton.errors import InputError, ModelError

FLAG = "--allow-lora-updates"


class NoAdapter(ModelError):
    """There is none at this path."""


def updates_folder(given: str) -> Path:
    """The folder of --allow-lora-updates. Raises InputError unless it is one."""
    try:
        folder = Path(given).expanduser().resolve()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{FLAG} {given[:200]!r} cannot be used: {reason(error)}") from error
    raise InputError(
        f"{FLAG} {given[:200]!r} is not a folder: name the one that holds the folders of adapters"
    )


def path_below(root: Path, given: str) -> str:
    """A client's path as one below `root`: no file is looked at. Raises InputError."""
    if not 0 < len(given) <= LONGEST_PATH or not given.isprintable():
        raise InputError(
            f"lora_path must have 1 to {LONGEST_PATH:,} printable characters, got {given[:80]!r}"
        )
    path = Path(given)
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
    if not parts or ".." in parts or Path(*parts).is_absolute():
        raise InputError(
            f"lora_path {given[:200]!r} is not below the folder of {FLAG}: name a folder in there, "
            "such as sql or teams/sql"
        )
    return str(Path(*parts))


def read_below(root: Path, name: str, path: str) -> AdapterFiles:
    """The adapter at a path_below() this folder. Raises NoAdapter, ModelError; their texts have the path
    as it was given."""
    folder = root / path
    try:
        leads_out = next((each for each in _all_of(folder) if not _within(root, each)), None)
        if leads_out is not None:
            raise ModelError(
                f"adapter {name}: {path} is a link, or holds one, that leads out of the folder of {FLAG}"
            )
        if not (folder / CONFIG).is_file():
            raise NoAdapter(f"adapter {name}: there is no folder {path} with an {CONFIG} in it")
        return read_adapter(name, folder)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"adapter {name}: {path} cannot be read: {reason(error)}") from error
    except ModelError as error:
        if isinstance(error, NoAdapter):
            raise
        raise ModelError(str(error).replace(str(folder), path)) from error


def read_same(root: Path | None, adapter: Adapter, path: str) -> AdapterFiles:
    """The same, if it is the adapter that is meant. Raises ModelError."""
    if root is None:
        raise ModelError(f"adapter {adapter.name}: {FLAG} names no folder here")
    found = read_below(root, adapter.name, path_below(root, path))
    if found.adapter.digest != adapter.digest:
        raise ModelError(
            f"adapter {adapter.name}: {path} holds another adapter here "
            f"({found.adapter.digest[:12]}) than where it was asked for ({adapter.digest[:12]})"
        )
    return found


def _all_of(folder: Path) -> Iterator[Path]:
    yield folder
    yield folder / CONFIG
    yield folder / WEIGHTS


def _within(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root)
