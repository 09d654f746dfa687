"""Store: compiled models on disk, made once, mapped by every process that runs them.

A program's file holds all that a forward needs, weights included; so a worker that finds one starts
without loading the checkpoint, and without importing transformers. Files are named by everything
that went into them (the checkpoint, the dtype, this package, torch and transformers) and the least
recently used go when they are too many.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from baton.engine.cpu.build import cache_folder
from baton.model_files import ModelFiles

DISK_SHARE = 0.25
"""Of the free disk: a program that takes more is kept in memory, by each process for itself."""

MOST_BYTES = 32 << 30
SUFFIX = ".program"

logger = logging.getLogger(__name__)


def about_bytes(files: ModelFiles) -> int:
    """What a program of this model may take, at most about."""
    if (
        files.folder is not None
    ):  # checkpoints are in 2 bytes a weight or more, programs in 4 or less
        return 2 * sum(path.stat().st_size for path in files.folder.glob("*.safetensors"))
    config = files.config
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    return 4 * hidden * (2 * files.vocab_size + 16 * layers * hidden)


def key_of(files: ModelFiles, dtype: str) -> str:
    """Equal keys, equal programs."""
    about: list[object] = [files.fingerprint, files.config, dtype, _package_digest()]
    about += [version(package) for package in ("torch", "transformers")]
    if files.folder is not None:
        weights = sorted(files.folder.glob("*.safetensors"))
        about += [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in weights]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def opened(key: str, make: Callable[[BinaryIO], None], size: int) -> BinaryIO:
    """The file of this key. If there is none, `make` writes it, in one process while others wait;
    what it raises leaves no file. `size`: about how many bytes it will take."""
    try:
        folder = cache_folder("programs")
        if size > shutil.disk_usage(folder).free * DISK_SHARE:
            raise OSError(f"{size / 2**30:.1f} GiB are too much for the disk of {folder}")
        with _locked(folder / f"{key}.lock"):
            path = folder / f"{key}{SUFFIX}"
            if not path.exists():
                _write(path, make)
                _forget_oldest(folder, path)
            os.utime(path)
            return path.open("rb")
    except OSError as error:
        logger.warning("the compiled model is not kept: %s", error)
        file = _nameless()
        make(file)
        return file


def forget(key: str) -> None:
    """Whatever is kept under this key is no good."""
    (cache_folder("programs") / f"{key}{SUFFIX}").unlink(missing_ok=True)


def _write(path: Path, make: Callable[[BinaryIO], None]) -> None:
    """Appears complete or not at all."""
    number, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(number, "w+b") as file:
        try:
            make(file)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise


def _forget_oldest(folder: Path, newest: Path) -> None:
    """Files that are mapped somewhere stay usable there after they are gone from here."""
    found = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in found:
        total += path.stat().st_size
        if total > MOST_BYTES and path != newest:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _nameless() -> BinaryIO:
    """A file of this process alone: in memory, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("baton"), "w+b")
    return tempfile.TemporaryFile()


def _package_digest() -> str:
    """Of the code that makes and runs programs."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
