"""Service: a whole service as real processes (`main.py serve`), with its own port and folder.

Its processes carry a token in their environment, so that one that outlives the service is found whatever
became of its parents. Failpoints are armed by files (baton/failpoint.py) in its folder.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from baton.failpoint import FIRED, VARIABLE, parse
from tools.faults.check import Census, Process
from tools.faults.client import fetch

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "BATON_FAULTS_SERVICE"
READY_S, CALM_S, STOP_S = 120.0, 20.0, 45.0
LOOK_S = 0.02
SHM = Path("/dev/shm")
HELD = ("kv_blocks_leased", "kv_blocks_quarantined", "num_requests_running", "num_requests_waiting")


class NotReady(Exception):
    """A service did not become what it should in time; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A failpoint that acted."""

    site: str
    action: str
    pid: int
    at: float  # monotonic seconds


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> dict[str, int]:
    """The living children of a process by name: router, prefill-0, decode-0, server."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if (name := _name(int(entry))) is not None:
                found[name] = int(entry)
    return found


def _name(pid: int) -> str | None:
    """What a process is called: its --name, or its module. None for zombies and others."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "--name" in words:
            return words[words.index("--name") + 1]
        if "-m" in words:
            return words[words.index("-m") + 1].rpartition(".")[2]
    return None


def memory_mib(pid: int) -> float:
    """Its own memory, without files and pools that it maps; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return 0.0


def fds(pid: int) -> int:
    """Open file descriptors; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def holders(token: str) -> dict[int, str]:
    """Processes whose environment has this token, with their command lines."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if f"{TOKEN}={token}".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                    line = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")
                    found[int(entry)] = line[:100]
    return found


class Service:
    """A context manager: at its end nothing of the service runs or lies around."""

    def __init__(
        self,
        *options: object,
        failpoints: Sequence[str] = (),
        expected: Mapping[str, int] | None = None,
        keep: Path | None = None,
    ) -> None:
        """`failpoints`: in force from the start, in every process. `expected`: workers by role when it
        is whole. `keep`: a folder for its logs, each service's in one of its own."""
        self._keep = keep
        self.port = free_port()
        self.expected = expected or {"prefill": 1, "decode": 1}
        self._options = [str(each) for each in options]
        self._key = ""
        if "--api-key" in self._options:
            key = self._options[self._options.index("--api-key") + 1]
            self._key = f"Authorization: Bearer {key}\r\n"
        self._points = list(failpoints)
        self._stack = contextlib.ExitStack()
        self._token = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path("/")
        self.leftovers: list[str] = []  # found by stop()

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bf-", dir="/tmp"))
        self.folder = Path(folder)
        for name in ("points", "tmp"):
            (self.folder / name).mkdir(mode=0o700)
        try:
            self._start()
            self.await_whole()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        self._process = self._spawn("main.py", "serve", "--port", self.port, *self._options)

    def _spawn(self, *words: object) -> subprocess.Popen[bytes]:
        """`python WORDS`, with the token, the failpoints and the log of this service."""
        points = ",".join([f"@{self.folder / 'points'}", *self._points])
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "TMPDIR": str(self.folder / "tmp"),
                    TOKEN: self._token,
                    VARIABLE: points,
                },
            )

    # ---- looking

    @property
    def said(self) -> str:
        """What it printed."""
        with contextlib.suppress(OSError):
            return (self.folder / "log").read_text(errors="replace")
        return ""

    @property
    def exit_code(self) -> int | None:
        """None: it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def main_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pids(self) -> dict[str, int]:
        """Its processes by name, without the one that starts them."""
        return children(self.main_pid)

    def run_folder(self) -> Path | None:
        """Sockets and logs of its processes."""
        found = (self.folder / "tmp").glob("baton-*")  # ranks that meet have one, too
        return next((each for each in found if (each / "logs").is_dir()), None)

    def logs(self) -> str:
        """What its processes logged."""
        folder = self.run_folder()
        files = sorted((folder / "logs").glob("*.log")) if folder else []
        return "".join(f"== {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in files)

    def logged(self, words: str) -> int:
        """Lines of its processes' logs with these words."""
        folder = self.run_folder()
        files = sorted((folder / "logs").glob("*.log")) if folder else []
        return sum(f.read_text(errors="replace").count(words) for f in files)

    async def state(self) -> dict[str, Any]:
        """What /readyz says; empty if nobody answers."""
        try:
            _, body = await fetch(self.port, "/readyz", timeout_s=5.0)
            return dict(json.loads(body))
        except (OSError, TimeoutError, ValueError):
            return {}

    def whole(self, state: Mapping[str, Any]) -> bool:
        """Ready, not degraded, and every worker alive."""
        if not state.get("ready") or state.get("degraded"):
            return False
        alive = [each["role"] for each in state["workers"] if each["state"] == "alive"]
        return all(alive.count(role) == number for role, number in self.expected.items())

    def await_whole(self, within_s: float = READY_S) -> None:
        """Raises NotReady."""
        deadline, state = time.monotonic() + within_s, {}
        while time.monotonic() < deadline:
            if self.exit_code is not None:
                raise NotReady(f"the service ended with {self.exit_code}: {self.said[-600:]}")
            state = asyncio.run(self.state())
            if self.whole(state):
                return
            time.sleep(LOOK_S)
        raise NotReady(f"not whole within {within_s:g} s: {state}; it said {self.said[-600:]}")

    def metrics(self) -> dict[str, float]:
        """/metrics by name with labels, without the prefix."""
        _, body = asyncio.run(fetch(self.port, "/metrics", headers=self._key))
        found = {}
        for line in body.decode().splitlines():
            if line.startswith("baton:"):
                name, _, value = line.removeprefix("baton:").rpartition(" ")
                found[name] = float(value)
        return found

    def metric(self, name: str) -> float:
        """The sum over all labels. KeyError for a metric that is not there."""
        values = [
            v for n, v in self.metrics().items() if n.partition("{")[0] in (name, f"{name}_total")
        ]
        if not values:
            raise KeyError(f"/metrics has no {name}")
        return sum(values)

    def census(self, *, calm_s: float = CALM_S) -> Census:
        """What it holds, as soon as nothing is held, or after `calm_s`. NotReady without counts."""
        deadline = time.monotonic() + calm_s
        while True:
            try:
                counts = [int(self.metric(name)) for name in HELD]
            except (KeyError, OSError, TimeoutError) as error:
                if time.monotonic() >= deadline:
                    raise NotReady(f"no counts within {calm_s:g} s: {error!r}") from error
            else:
                if not any(counts) or time.monotonic() >= deadline:
                    break
            time.sleep(LOOK_S)
        pids = {"main": self.main_pid, **self.pids()}
        folder = self.run_folder()
        return Census(
            {name: Process(pid, fds(pid), memory_mib(pid)) for name, pid in pids.items()},
            frozenset(each.name for each in SHM.iterdir()) if SHM.is_dir() else frozenset(),
            frozenset(_kinds(folder)) if folder else frozenset(),
            *counts,
        )

    # ---- faults

    def arm(self, point: str) -> Path:
        """Let the next process that comes to this failpoint act. Raises ValueError."""
        path = self.folder / "points" / str(parse(point))
        path.touch()
        return path

    def disarm(self, point: str) -> None:
        """Nobody acts any more."""
        (self.folder / "points" / str(parse(point))).unlink(missing_ok=True)

    def fired(self) -> list[Fired]:
        """The failpoints that acted, so far."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "points" / FIRED).read_text().splitlines()
            return [Fired(**json.loads(line)) for line in lines]
        return []

    def signal(self, name: str, number: signal.Signals) -> int | None:
        """Signal one process by name; `main` starts the others. Its pid, or None if it is not there."""
        pid = self.main_pid if name == "main" else self.pids().get(name)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                return pid
        return None

    # ---- the end

    def stop(self) -> None:
        """End it as a user would; then look for what is left, note it and remove it."""
        process = self._process
        self._keep_logs()
        if process is not None:
            for pid in holders(self._token):  # stopped processes cannot end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            for grace_s in (STOP_S, 5.0):
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(grace_s)
            if process.poll() is None:
                self.leftovers.append(f"main.py serve did not end: {self.said[-300:]}")
                process.kill()
                process.wait()
            self._look_for_leftovers()
            self._process = None
        self._stack.close()

    def _keep_logs(self) -> None:
        if self._keep is None:
            return
        mine = self._keep / f"{time.strftime('%H%M%S')}-{self.port}"
        mine.mkdir(parents=True, exist_ok=True)
        found = [self.folder / "log", self.folder / "points" / FIRED]
        if folder := self.run_folder():
            found += (folder / "logs").glob("*.log")
        for path in found:
            with contextlib.suppress(OSError):
                shutil.copy(path, mine / path.name.lstrip("."))

    def _look_for_leftovers(self) -> None:
        deadline = time.monotonic() + 2.0
        while (left := holders(self._token)) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        for pid, line in left.items():
            self.leftovers.append(f"process {pid} still runs: {line}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in (self.folder / "tmp").glob("baton-*"):
            self.leftovers.append(f"the run folder {folder.name} is still there")


def _kinds(folder: Path) -> Iterator[str]:
    """Names of files, the random part of the sockets' replaced: a new worker has a new socket."""
    counts: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        name = path.name
        if name.startswith("kv-"):
            counts["kv"] = number = counts.get("kv", 0) + 1
            name = f"kv-{number}.sock"
        yield name
