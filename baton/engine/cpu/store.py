"""The cache of compiled models on disk. A program is compiled once and mapped by every process.

A program's file contains everything a forward needs, weights included. A worker that finds one starts
without loading the checkpoint and without importing transformers. The file name is a hash of all
inputs (checkpoint, dtype, this package, torch and transformers). The least recently used programs
are deleted when all of them exceed MOST_BYTES.
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
"""The share of the free disk a program may take. A larger one stays in the memory of each process."""

MOST_BYTES = 32 << 30
SUFFIX = ".program"

logger = logging.getLogger(__name__)


def about_bytes(files: ModelFiles) -> int:
    """An upper estimate of the size of this model's program, in bytes."""
    if files.weights:  # checkpoints have at least 2 bytes per weight, programs at most 4
        return 2 * sum(path.stat().st_size for path in files.weights)
    config = files.config
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    return 4 * hidden * (2 * files.vocab_size + 16 * layers * hidden)


def key_of(files: ModelFiles, dtype: str) -> str:
    """The cache key: equal keys mean equal programs."""
    about: list[object] = [files.fingerprint, files.config, dtype, _package_digest()]
    about += [version(package) for package in ("torch", "transformers")]
    about += [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files.weights]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def opened(key: str, make: Callable[[BinaryIO], None], size: int) -> BinaryIO:
    """The file of this key. If there is none, one process calls `make` to write it while others wait.
    If `make` raises, no file is left. `size`: its estimated bytes."""
    try:
        folder = cache_folder("programs")
        if size > shutil.disk_usage(folder).free * DISK_SHARE:
            raise OSError(f"{folder} has too little free space for {size / 2**30:.1f} GiB")
        with _locked(folder / f"{key}.lock"):
            path = folder / f"{key}{SUFFIX}"
            if not path.exists():
                _write(path, make)
                _forget_oldest(folder, path)
            os.utime(path)
            return path.open("rb")
    except OSError as error:
        logger.warning("the compiled model is not stored: %s", error)
        file = _nameless()
        make(file)
        return file


def forget(key: str) -> None:
    """Delete the file of this key."""
    (cache_folder("programs") / f"{key}{SUFFIX}").unlink(missing_ok=True)


def _write(path: Path, make: Callable[[BinaryIO], None]) -> None:
    """Write the file atomically."""
    number, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(number, "w+b") as file:
        try:
            make(file)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise


def _forget_oldest(folder: Path, newest: Path) -> None:
    """Delete the least recently used programs beyond MOST_BYTES. Existing mappings stay valid."""
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
    """An anonymous file of this process, in memory if the system supports it."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("baton"), "w+b")
    return tempfile.TemporaryFile()


def _package_digest() -> str:
    """A hash of the code that compiles and runs programs."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
