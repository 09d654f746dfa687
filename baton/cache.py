"""The cache on disk: native code, compiled models, tokenizers. Each is made once, by one process for all.

    $XDG_CACHE_HOME or ~/.cache / baton / native     / gemm-<hash>.o, program-<hash>.so
                                        / programs   / gpt2-float32-<hash>.program
                                        / gguf       / <hash> /  what a GGUF file says beside its weights
                                        / tokenizers / <hash> /  made from a tokenizer.model
                                        / limit        bytes; only if `cache --limit` has set it

NAME, a file or a folder, is made under its lock, NAME.lock, as NAME.part, and renamed when it is whole.
What a killed process leaves behind is removed by the next one that takes the lock or sweeps. The least
recently used go first when all of them exceed the limit. A program that is mapped stays valid. The files
of a folder are opened later than it is found, so it stays for an hour after its last use. A process reads
what it needs of them when it starts, because a service runs for longer.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from baton.errors import InputError

NATIVE, PROGRAMS, GGUF, TOKENIZERS = "native", "programs", "gguf", "tokenizers"
FOLDER = ""  # the suffix of what is kept as a folder
ROOMS = {NATIVE: (".o", ".so"), PROGRAMS: (".program",), GGUF: (FOLDER,), TOKENIZERS: (FOLDER,)}
"""The suffixes of what is kept, by the folder of the cache that it is in."""
KINDS = {".o": "part", ".so": "library", ".program": "model", FOLDER: "tokenizer"}
UNFINISHED = (".part", ".tmp")
LIMIT_FILE = "limit"
LIMIT_BYTES = 4_000_000_000
"""The default limit of the whole cache."""
FORGOTTEN_S = 3600.0
"""Versions before 0.3 gave unfinished files names that do not tell their lock. After so long without a
change nobody writes them."""
UNUSED_S = 3600.0
"""A folder that was used within this time may be about to be read: only `clear` deletes it."""
POWERS = "KMGT"


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete file of the cache, or a folder of files that belong together."""

    path: Path
    size: int  # bytes
    used: float  # when it was last used, in seconds since 1970

    @property
    def what(self) -> str:
        """model, library, part (of libraries) or tokenizer."""
        return KINDS[self.path.suffix]

    @property
    def name(self) -> str:
        """The name without its hash; the hash where that is the whole name."""
        return self.path.stem.rpartition("-")[0] or self.path.stem


def cache_root() -> Path:
    """Where the folders are. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"


def cache_folder(name: str) -> Path:
    """A folder of the cache that only its owner can write to, because its files are believed, mapped and
    executed. PermissionError if others can write to it."""
    folder = cache_root() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by other users")
    return folder


def part_of(path: Path) -> Path:
    """The name of a file or folder while it is incomplete."""
    return path.with_name(f"{path.name}.part")


def kept_folder(room: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of a room. If there is none, one process calls `make` to fill it, while others
    wait; if that raises, none is left. Raises OSError if it cannot be stored."""
    path = cache_folder(room) / name
    try:
        with locked(path):
            made = not path.is_dir()
            if made:
                _fill(path, make)
            os.utime(path)
    except OSError:
        if not path.is_dir():
            raise
        return path  # on a disk that cannot be written what is there is whole, and can be used
    if made:
        keep_within_limit(path)
    return path


def _fill(path: Path, make: Callable[[Path], None]) -> None:
    """Make the folder at once: other processes see all of it or nothing. Its lock is held."""
    part = part_of(path)
    _remove(part)  # of a process that was killed
    part.mkdir(mode=0o700)
    try:
        make(part)
        part.rename(path)
    finally:
        _remove(part)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock under which `path` is made, opened first, and deleted. Waits for it."""
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


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _delete(path: Path, *, used: float | None = None) -> bool:
    """Delete it and what is left of its making, unless someone holds its lock or it is not ours. `used`:
    and only if it was last used then."""
    try:
        with _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if used is not None and path.exists() and path.stat().st_mtime != used:
                return False  # used again, or made anew, since it was listed
            _remove(part := part_of(path))
            with suppress(FileNotFoundError):
                path.rename(part)  # a folder vanishes at once, whoever is reading it
                _remove(part)
            return True
    except (BlockingIOError, PermissionError):
        return False


def _is_kept(path: Path) -> bool:
    """Is it, by its name, something complete and not a lock, a part or somebody else's?"""
    return path.suffix in ROOMS[path.parent.name] and path.is_dir() == (path.suffix == FOLDER)


def _everything() -> Iterator[Path]:
    """All that lies in the rooms."""
    for room in ROOMS:
        yield from (cache_root() / room).glob("*")


def entries() -> list[Entry]:
    """Everything complete, the most recently used first."""
    found = []
    for path in filter(_is_kept, _everything()):
        with suppress(FileNotFoundError, PermissionError):
            files = path.iterdir() if path.is_dir() else (path,)
            size = sum(each.stat().st_size for each in files)
            found.append(Entry(path, size, path.stat().st_mtime))
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
    """Delete what exceeds the limit, and what killed processes have left. `kept` stay, and folders that
    may be about to be read."""
    sweep()
    found, now = entries(), time.time()
    read = {each.path for each in found if each.path.is_dir() and now - each.used < UNUSED_S}
    for each in surplus(found, limit(), read.union(kept)):
        _delete(each.path, used=each.used)


def sweep() -> int:
    """Delete what killed processes have left: what is incomplete, and locks that nobody holds. Returns
    how many there were."""
    return sum(_sweep(path) for path in _everything() if path.suffix in (*UNFINISHED, ".lock"))


def _sweep(path: Path) -> bool:
    owner = path.with_suffix("")
    try:
        known = owner.suffix in ROOMS[path.parent.name]
        if not known and time.time() - path.stat().st_mtime < FORGOTTEN_S:
            return False
        with _lock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove(path)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return False
    return True


def clear() -> list[Entry]:
    """Delete everything that is not being made. Returns what was deleted."""
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
