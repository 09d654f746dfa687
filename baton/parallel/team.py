"""Team: the other ranks of a worker, as its first rank sees them: processes that it starts, tells what to
do, and ends with.

A worker lives as long as all of its ranks. When one of the others ends, the first rank says so and ends
too; they end with the first, by the kernel (die_with) and because their socket is closed.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from baton.errors import InputError, ModelError, OutOfMemory, ProtocolError, WorkerLost
from baton.package import ROOT
from baton.parallel.orders import pack_order

MODULE = "baton.parallel.follower"
SAID = {error.exit_code for error in (InputError, ModelError, ProtocolError, OutOfMemory)}
"""Exit codes of ranks that have printed why."""
NOTICED_S = 5.0
"""So long after an operation of all ranks has failed, the end of one of them may take to be seen."""

Ended = Callable[[int, int], None]
"""Rank and return code of a process that has ended by itself."""


def end_too(rank: int, code: int) -> None:
    """End this process, with the line that its supervisor shows."""
    if code not in SAID:
        print(f"error: {why_ended(rank, code)}", file=sys.stderr, flush=True)
    os._exit(code if code in SAID else WorkerLost.exit_code)


def why_ended(rank: int, code: int) -> str:
    """For people."""
    try:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        how = f"signal {-code}"
    return f"rank {rank} of this tensor-parallel worker ended ({how}), so the whole worker ends"


class Team:
    """The processes of ranks 1 to size - 1."""

    def __init__(self, size: int, settings: dict[str, Any], ended: Ended = end_too) -> None:
        """Start them. Each is sent `settings` and its rank; what they print goes where this process's
        own output goes."""
        self._ended = ended
        self._closing = False
        self._connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._watches: list[threading.Thread] = []
        try:
            for rank in range(1, size):
                self._start(rank, {**settings, "rank": rank})
        except OSError as error:
            self.close()
            raise WorkerLost(f"the ranks of this worker could not be started: {error}") from error

    def _start(self, rank: int, settings: dict[str, Any]) -> None:
        here, there = socket.socketpair()
        with there:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(there.fileno()), str(os.getpid())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(),),
            )
        self.processes.append(process)
        self._connections.append(Connection(here.detach()))
        watch = threading.Thread(target=self._watch, args=(rank, process), daemon=True)
        watch.start()
        self._watches.append(watch)
        self._connections[-1].send_bytes(pack_order("settings", settings))

    def order(self, kind: str, *fields: Any) -> None:
        """Tell all of them. WorkerLost if one is gone."""
        data = pack_order(kind, *fields)
        try:
            for connection in self._connections:
                connection.send_bytes(data)
        except OSError as error:
            raise self.lost(error) from error

    def lost(self, error: BaseException) -> WorkerLost:
        """What to raise when an operation of all ranks has failed: their steps are not the same any more,
        so this worker cannot go on. Does not return if that is because one has ended."""
        for watch in self._watches:
            watch.join(NOTICED_S / len(self._watches))
        text = " ".join(str(error).split())[:300]
        return WorkerLost(
            "a forward failed on the first rank of a tensor-parallel worker, and the others cannot go on "
            f"without it: {type(error).__name__}: {text}"
        )

    def close(self) -> None:
        """End them."""
        self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.wait()
        for watch in self._watches:
            watch.join()

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        if not self._closing:
            self._ended(rank, code)
