"""The cache of compiled models on disk. A program is compiled once and mapped by every process.

A program's file contains everything a forward needs, weights included. A worker that finds one starts
without loading the checkpoint and without importing transformers. The file name holds a hash of all
inputs (checkpoint, dtype, this package, torch and transformers), and no paths: every clone and every
copy of a model finds it. Limits and deletion: baton/cache.py.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from baton.cache import cache_folder, keep_within_limit, locked, part_of
from baton.model_files import ModelFiles

DISK_SHARE = 0.25
"""The share of the free disk a program may take. A larger one stays in the memory of each process."""

SUFFIX = ".program"
HASHED_BYTES = 64 << 20
"""Weights up to this size are told apart by all of their bytes (0.05 s), larger ones by the model's
fingerprint and the time of their last change."""

logger = logging.getLogger(__name__)


def about_bytes(files: ModelFiles) -> int:
    """An upper estimate of the size of this model's program, in bytes."""
    if files.quantized is not None:
        return 4 * files.quantized.numbers
    if files.weights:  # checkpoints have at least 2 bytes per weight, programs at most 4
        return 2 * sum(path.stat().st_size for path in files.weights)
    config = files.config
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    return 4 * hidden * (2 * files.vocab_size + 16 * layers * hidden)


def key_of(files: ModelFiles, dtype: str) -> str:
    """The cache key, which begins with the model's type and dtype: equal keys mean equal programs."""
    about: list[object] = [files.fingerprint, files.config, dtype, _package_digest()]
    about += [version(package) for package in ("torch", "transformers")]
    about += [_weights_digest(path) for path in files.weights]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return f"{re.sub('[^A-Za-z0-9_]+', '-', f'{files.model_type} {dtype}')}-{digest}"


def _weights_digest(path: Path) -> str:
    """Equal for equal files of weights, wherever they are."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size} ".encode())
    with path.open("rb") as file:
        if size <= HASHED_BYTES:
            digest.update(file.read())
        else:  # the fingerprint has samples of it
            digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def opened(key: str, make: Callable[[BinaryIO], None], size: int) -> BinaryIO:
    """The file of this key. If there is none, one process calls `make` to write it while others wait.
    If `make` raises, no file is left. `size`: its estimated bytes."""
    try:
        folder = cache_folder("programs")
        if size > shutil.disk_usage(folder).free * DISK_SHARE:
            raise OSError(f"{folder} has too little free space for {size / 2**30:.1f} GiB")
        path = folder / f"{key}{SUFFIX}"
        with locked(path):
            made = not path.exists()
            if made:
                _write(path, make)
            os.utime(path)
            file: BinaryIO = path.open("rb")
        if made:
            keep_within_limit(path)
        return file
    except OSError as error:
        logger.warning("the compiled model is not stored: %s", error)
        file = _nameless()
        make(file)
        return file


def forget(key: str) -> None:
    """Delete the file of this key."""
    (cache_folder("programs") / f"{key}{SUFFIX}").unlink(missing_ok=True)


def _write(path: Path, make: Callable[[BinaryIO], None]) -> None:
    """Write the file atomically. Its lock is held."""
    part = part_of(path)
    part.unlink(missing_ok=True)  # of a process that was killed; another may still have it open
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b") as file:
            make(file)
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
