"""Faults that happen at a step of the work, in the process that does it (baton/failpoint.py).

A test that watches a cluster and kills something "in the middle" may look too late: on a busy machine
the work may be over before it looks. A process that stops itself at its 20th step is in the middle.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from baton.failpoint import FIRED, VARIABLE
from tests.cluster.processes import short_folder
from tests.patience import until

SLOWLY = "decode.step:delay:%1:0.1"
"""Steps of a tenth of a second: the rest of an answer lasts longer than a test takes to act."""


class Points:
    """A folder of failpoints. Each is met by one process, the first that comes so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment = {VARIABLE: f"@{folder}"}

    def arm(self, *points: str) -> None:
        for each in points:
            (self._folder / each).touch()

    def disarm(self, point: str) -> None:
        (self._folder / point).unlink()

    def fired(self, count: int) -> Sequence[int]:
        """The processes that acted, in their order, once there are so many."""
        told = self._folder / FIRED

        def look() -> list[int] | None:
            lines = told.read_text().splitlines(keepends=True) if told.exists() else []
            pids = [json.loads(line)["pid"] for line in lines if line.endswith("\n")]
            return pids if len(pids) >= count else None

        return until(look, f"{count} of the failpoints")

    def taken(self, count: int) -> Sequence[int]:
        """The same, and the next count begins at none."""
        pids = self.fired(count)
        (self._folder / FIRED).unlink()
        return pids


@contextmanager
def failpoints() -> Iterator[Points]:
    """Failpoints of processes that are started with this environment."""
    with short_folder() as folder:
        yield Points(folder)
