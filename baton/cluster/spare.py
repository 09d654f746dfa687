"""Spare: an idle process that has imported what workers and the HTTP server need, so that any of them is
replaced without the second or two of imports. The process's own side: baton/cluster/standby.py.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from baton.cluster.restarts import Restarts
from baton.cluster.standby import COMMAND, ROOM
from baton.package import ROOT

WORTH_BYTES = 8 << 30
"""Where less memory is free, `serve` keeps no spare unless told to."""

SERVER_IMPORTS = ("baton.server.run",)
"""What the HTTP server's command imports late."""


class Spare:
    """At most one idle process. Its own death is no event: the next call of keep() replaces it, later and
    later if it dies again and again."""

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        """`modules`: what to import. The idle process logs into `folder`."""
        self.process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None  # our end of its stdin
        self._log = folder / "spare.log"
        self._modules = list(modules)
        self._restarts = Restarts()

    def also_imports(self, modules: Sequence[str]) -> None:
        """Idle processes that are started from now on import these, too."""
        self._modules += modules

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
            self._orders, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        if self.process is None:
            self._hang_up()
            self._restarts.died(now)
        return self.process is not None

    def end(self) -> None:
        """End the idle process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
        self._hang_up()

    def become(
        self,
        command: Sequence[str],
        output: tuple[int, int],
        descriptors: Sequence[int],
        now: float,
    ) -> subprocess.Popen[bytes] | None:
        """The idle process, which runs this command from now on, with this stdout and stderr. Where the
        command names one of the `descriptors`, it finds its own copy. None if there is none."""
        process, self.process = self.process, None
        if process is None or self._orders is None:
            return None
        module, *arguments = command
        order = {"module": module, "arguments": arguments, "descriptors": list(descriptors)}
        line = f"{json.dumps(order)}\n".encode()
        try:
            sent = socket.send_fds(self._orders, [line], [*output, *descriptors])
            self._orders.sendall(line[sent:])
        except OSError:  # it is dead
            process.wait()
            self._restarts.died(now)
            return None
        finally:
            self._hang_up()
        self._restarts.serves(now)
        return process

    def _hang_up(self) -> None:
        orders, self._orders = self._orders, None
        if orders is not None:
            orders.close()
