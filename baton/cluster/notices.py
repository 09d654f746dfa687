"""Notices of a process that is still starting: lines of its log that baton.log.NOTICE wrote."""

from contextlib import suppress
from pathlib import Path

from baton.log import NOTICE

MARK = f" {NOTICE.name}: "


class Notices:
    """Reads a log from its present end on."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = log.stat().st_size if log.exists() else 0

    def new(self) -> list[str]:
        """The texts of the complete lines since the last call."""
        with suppress(OSError), self._log.open("rb") as log:
            log.seek(self._read)
            whole, newline, _ = log.read().rpartition(b"\n")
            self._read += len(whole) + len(newline)
            lines = whole.decode(errors="replace").splitlines()
            return [line.partition(MARK)[2] for line in lines if MARK in line]
        return []
