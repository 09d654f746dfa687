"""Spare: an idle process that has imported what workers need, so that a worker is replaced without the
second or two of imports. The process's own side: baton/cluster/standby.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from baton.cluster.restarts import Restarts
from baton.cluster.standby import COMMAND, ROOM
from baton.host import any_stopped
from baton.package import ROOT

WORTH_BYTES = 8 << 30
"""Where less memory is free, `serve` keeps no spare unless told to."""


class Spare:
    """At most one idle process. Its own death is no event: the next call of keep() replaces it, later and
    later if it dies again and again."""

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        """`modules`: what to import. The idle process logs into `folder`."""
        self.process: subprocess.Popen[bytes] | None = None
        self._log = folder / "spare.log"
        self._modules = modules
        self._restarts = Restarts()

    def keep(self, now: float) -> bool:
        """Start one if there is none. Returns whether one was started."""
        if self.process is not None and self.process.poll() is not None:
            self.end()
            self._restarts.died(now)
        due = self._restarts.due
        if self.process is not None or (due is not None and now < due):
            return False
        self._restarts.started()
        command = [sys.executable, "-m", COMMAND, str(os.getpid()), *self._modules, ROOM]
        with suppress(OSError), self._log.open("ab") as log:  # not now: without a spare, then
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        if self.process is None:
            self._restarts.died(now)
        return self.process is not None

    def end(self) -> None:
        """End the idle process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def become(
        self, command: Sequence[str], log: Path, now: float
    ) -> subprocess.Popen[bytes] | None:
        """The idle process, which runs this command from now on, with this log. None if none can."""
        if self.process is not None and any_stopped([self.process.pid]):
            self.end()  # it would never begin
            self._restarts.died(now)
        process, self.process = self.process, None
        if process is None:
            return None
        module, *arguments = command
        order = json.dumps({"module": module, "arguments": arguments, "log": str(log)})
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pipe.write(f"{order}\n".encode())
        except OSError:  # it is dead
            process.wait()
            self._restarts.died(now)
            return None
        self._restarts.serves(now)
        return process
