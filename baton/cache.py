"""The cache on disk: native code and compiled models. Each file is made once, by one process for all.

    $XDG_CACHE_HOME or ~/.cache / baton / native   / gemm-<hash>.o, program-<hash>.so
                                        / programs / gpt2-float32-<hash>.program
                                        / limit      bytes; only if `cache --limit` has set it

A file NAME is made under its lock, NAME.lock, as NAME.part, and renamed when it is complete. What a
killed process leaves behind is removed by the next one that takes the lock or sweeps. The least recently
used files go first when all of them exceed the limit; a program that is mapped stays valid.
"""

import fcntl
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from baton.errors import InputError

NATIVE, PROGRAMS = "native", "programs"
KINDS = {".o": "part", ".so": "library", ".program": "model"}
UNFINISHED = (".part", ".tmp")
LIMIT_FILE = "limit"
LIMIT_BYTES = 4_000_000_000
"""The default limit of the whole cache."""
FORGOTTEN_S = 3600.0
"""Versions before 0.3 gave unfinished files names that do not tell their lock. After so long without a
change nobody writes them."""
POWERS = "KMGT"


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete file of the cache."""

    path: Path
    size: int  # bytes
    used: float  # when it was last used, in seconds since 1970

    @property
    def what(self) -> str:
        """model, library or part (of libraries)."""
        return KINDS[self.path.suffix]

    @property
    def name(self) -> str:
        """The file's name without its hash."""
        return self.path.stem.rpartition("-")[0] or self.path.stem


def cache_root() -> Path:
    """Where the folders are. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"


def cache_folder(name: str) -> Path:
    """A folder of the cache that only its owner can write to, because its files are executed or mapped.
    PermissionError if others can write to it."""
    folder = cache_root() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by other users")
    return folder


def part_of(path: Path) -> Path:
    """The file's name while it is incomplete."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock under which the file `path` is made, opened first, and deleted. Waits for it."""
    with _lock(path, fcntl.LOCK_EX):
        yield


@contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    """BlockingIOError if `how` says not to wait and another holds it. The lock's file is deleted by its
    last holder; whoever had opened it before then finds another one in its place and tries again."""
    lock = path.with_name(f"{path.name}.lock")
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, how)
            if _names(lock, file.fileno()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _names(path: Path, descriptor: int) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _delete(path: Path) -> bool:
    """Delete the file and what is left of its making, unless someone holds its lock."""
    try:
        with _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            part_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return True
    except BlockingIOError:
        return False


def entries() -> list[Entry]:
    """Every complete file, the most recently used first."""
    found = []
    for folder in (NATIVE, PROGRAMS):
        for path in (cache_root() / folder).glob("*"):
            if path.suffix in KINDS:
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append(Entry(path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda each: (each.used, each.path.name), reverse=True)


def surplus(found: list[Entry], limit: int, kept: Collection[Path]) -> list[Entry]:
    """What has to go so that the rest fits `limit` bytes: the least recently used. `kept` stay."""
    left, gone = sum(each.size for each in found), []
    for each in sorted(found, key=lambda entry: (entry.used, entry.path.name)):
        if left > limit and each.path not in kept:
            gone.append(each)
            left -= each.size
    return gone


def keep_within_limit(*kept: Path) -> None:
    """Delete what exceeds the limit, and what killed processes have left. `kept` stay."""
    sweep()
    for each in surplus(entries(), limit(), kept):
        _delete(each.path)


def sweep() -> int:
    """Delete what killed processes have left: incomplete files and locks that nobody holds. Returns
    how many there were."""
    swept = 0
    for folder in (NATIVE, PROGRAMS):
        for path in (cache_root() / folder).glob("*"):
            if path.suffix in (*UNFINISHED, ".lock"):
                swept += _sweep(path)
    return swept


def _sweep(path: Path) -> bool:
    owner = path.with_suffix("")
    try:
        if owner.suffix not in KINDS and time.time() - path.stat().st_mtime < FORGOTTEN_S:
            return False
        with _lock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def clear() -> list[Entry]:
    """Delete every file that is not being made. Returns what was deleted."""
    sweep()
    return [each for each in entries() if _delete(each.path)]


def limit() -> int:
    """The most bytes of the whole cache."""
    try:
        return int((cache_root() / LIMIT_FILE).read_text())
    except (OSError, ValueError):
        return LIMIT_BYTES


def set_limit(size: int) -> None:
    """From now on, for every process of this user."""
    root = cache_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = part_of(root / f"{LIMIT_FILE}.{os.getpid()}")
    part.write_text(f"{size}\n")
    part.replace(root / LIMIT_FILE)


def parsed_size(text: str) -> int:
    """Bytes: `20G` and `20 GB` are 20,000,000,000; `20GiB` is more; `1000`. InputError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"a size is a number with K, M, G or T, such as 20G, got {text!r}")
    number, unit, binary = match.groups()
    power = POWERS.index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
