"""Run folder: where a cluster keeps its sockets, pids and logs while it runs.

Others clear the temporary folder: a cleaner of old files, a cluster that starts and removes what dead
ones left. So the owner holds a lock on it (flock), which systemd-tmpfiles respects and which shows in
every container that it lives. A folder that is gone all the same is made again.
"""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from baton.host import process_runs

PREFIX = "baton-"
SOCKET, LOGS = "router.sock", "logs"
MODE = 0o700


class RunFolder:
    """One folder of this process, with a folder for logs in it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._lock = -1
        self._fill()  # without a look at it: some file systems show another mode or owner

    def make(self) -> None:
        """Make what is missing of it. OSError if that cannot be, or if somebody else has made it."""
        with suppress(FileNotFoundError):
            if self._lock >= 0 and _is(self.path, self._lock):  # the one that this process made
                self._fill()
                return
        try:
            self.path.mkdir(MODE)
        except FileExistsError:
            self._check()
        self._fill()

    def _check(self) -> None:
        if not is_private(self.path):
            raise PermissionError(errno.EPERM, f"{self.path} belongs to somebody else now")

    def _fill(self) -> None:
        """Its parts, and the lock."""
        with suppress(FileExistsError):
            (self.path / LOGS).mkdir(MODE)
        if self._lock < 0 or not _is(self.path, self._lock):
            self._release()
            self._lock = os.open(self.path, os.O_RDONLY)
            with suppress(OSError):  # some file systems have no locks, and this one is only advice
                fcntl.flock(self._lock, fcntl.LOCK_SH)

    def remove(self) -> None:
        """Nobody needs it any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def write_missing(path: Path, content: bytes) -> None:
    """A file that only this user can read: the whole of it or none, as the disk may be full. An existing
    one stays as it is. Raises OSError."""
    if path.exists():
        return
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    new.replace(path)


def is_private(folder: Path) -> bool:
    """It is a folder of this user that nobody else can enter."""
    found = folder.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not stat.S_IMODE(found.st_mode) & 0o077


def sweep() -> None:
    """Remove the run folders of processes that were killed before they could do so, and the folders in
    which ranks of a worker were about to meet (baton/parallel/start.py)."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        with suppress(OSError, ValueError):
            if folder.stat().st_uid == os.getuid() and not process_runs(int(owner)):
                _remove_unless_held(folder)


def _remove_unless_held(folder: Path) -> None:
    """The owner may run where its number says nothing: in a container that shares this folder."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)


def _is(path: Path, descriptor: int) -> bool:
    return os.path.samestat(path.stat(), os.fstat(descriptor))
