"""Cluster: the processes of one cluster on this machine. They are started with the commands of the
README, restarted when they die, and stopped in any case.

    run folder (mode 0700)/   router.sock   kv-*.sock   logs/router.log   logs/prefill-0.log ...

Every child ends with this process, even after SIGKILL (baton/host.py). A child that exits with a code
for which a restart cannot help (2, 3, 4, 6) is not restarted: its last error message is raised.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from baton.clock import Clock, monotonic
from baton.cluster.options import ClusterOptions
from baton.errors import BatonError, InputError, ModelError, OutOfMemory, ProtocolError, WorkerLost
from baton.host import core_numbers, process_runs
from baton.package import ROOT
from baton.topology import threads_per_worker
from baton.wire.messages import ClusterInfo

PREFIX = "baton-"
BACK_OFF_S = (0.0, 0.5, 1.0, 2.0)
CRASH_LOOP = (5, 60.0)
"""How many deaths of one process within how many seconds end the cluster."""

FINAL: dict[int, type[BatonError]] = {
    error.exit_code: error for error in (InputError, ModelError, ProtocolError, OutOfMemory)
}


@dataclass(frozen=True, slots=True)
class Beside:
    """A process to run beside the cluster. It is passed the router's address, prints to the terminal and
    inherits these descriptors."""

    name: str
    command: list[str]
    descriptors: tuple[int, ...] = ()


@dataclass(slots=True)
class Child:
    """One process, through all its restarts."""

    name: str
    command: list[str]
    log: Path | None  # None: the terminal
    descriptors: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)
    restart_at: float | None = None
    joined: bool = False  # the router has listed it


class Cluster:
    """A context manager: at the end of the block all its processes have ended."""

    def __init__(self, options: ClusterOptions, *, clock: Clock = monotonic) -> None:
        self.options = options
        self._clock = clock
        self.run_dir = Path("/")  # set by start()
        self._children: list[Child] = []

    @property
    def address(self) -> str:
        """Where the router listens."""
        return f"ipc://{self.run_dir}/router.sock"

    def start(self) -> None:
        """Start the router and every worker, at the same time. Returns at once."""
        _sweep()
        self.run_dir = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        (self.run_dir / "logs").mkdir()
        for name, command in self.commands():
            child = Child(name, command, self.run_dir / "logs" / f"{name}.log")
            self._children.append(child)
            self._spawn(child)

    def add(self, beside: Beside) -> None:
        """Start one more process, and supervise it too."""
        command = [*beside.command, "--router", self.address]
        child = Child(beside.name, command, None, beside.descriptors)
        self._children.append(child)
        self._spawn(child)

    def commands(self) -> list[tuple[str, list[str]]]:
        """Names and command lines, as a user would type them into as many terminals."""
        options = self.options
        router = ["router", "--address", self.address, *options.arguments("router")]
        router += ["--batch-size", str(options.batch_size)]
        if options.topology.colocated:
            router.append("--colocated")
        commands = [("router", router)]
        threads = str(threads_per_worker(options.topology))
        for role, devices in (
            ("prefill", options.topology.prefill_devices),
            ("decode", options.topology.decode_devices),
        ):
            for index, device in enumerate(devices):
                name = f"{role}-{index}"
                command = [f"{role}_worker", "--router", self.address, *options.arguments(role)]
                command += ["--device", device, "--name", name]
                if device == "cpu" and not core_numbers():  # else the router hands out cores
                    command += ["--threads", threads]
                if role == "decode":
                    command += ["--max-num-seqs", str(options.batch_size)]
                commands.append((name, command))
        return commands

    # ---- while it runs

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        """Restart processes that died, and kill workers that the router has given up; call it often.
        Returns notices for the user; raises the error of a process for which a restart cannot help."""
        notes = []
        if info is not None:
            notes += self._kill_given_up(info)
        now = self._clock()
        for child in self._children:
            if child.process is not None and (code := child.process.poll()) is not None:
                notes.append(self._died(child, code, now))
            if child.process is None and child.restart_at is not None and now >= child.restart_at:
                self._spawn(child)
        return notes

    def _kill_given_up(self, info: ClusterInfo) -> list[str]:
        """Kill workers that had joined and that the router no longer lists: they are stalled."""
        listed = {worker.worker.rpartition(".")[0] for worker in info.workers}
        notes = []
        for child in self._children:
            if child.name in listed:
                child.joined = True
            elif child.joined and child.process is not None and child.process.poll() is None:
                child.joined = False
                child.process.kill()
                child.process.wait()
                notes.append(f"{child.name} had stopped answering and was killed")
        return notes

    def _died(self, child: Child, code: int, now: float) -> str:
        child.process, child.joined = None, False
        if child.name == "router":  # workers join the next one anew
            for other in self._children:
                other.joined = False
        last_words = self.last_words(child.name)
        if code in FINAL:
            raise FINAL[code](last_words or f"{child.name} ended with exit code {code}")
        deaths, within_s = CRASH_LOOP
        child.deaths = [at for at in child.deaths if now - at < within_s] + [now]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if len(child.deaths) >= deaths:
            raise WorkerLost(
                f"{child.name} died {deaths} times within {within_s:g} s, the last time with {how}"
                + (f": {last_words}" if last_words else "")
            )
        child.restart_at = now + BACK_OFF_S[len(child.deaths) - 1]
        return f"{child.name} died ({how}) and is started again"

    def last_words(self, name: str) -> str:
        """The last error message in the log of a process."""
        with suppress(OSError):
            lines = (self.run_dir / "logs" / f"{name}.log").read_text(errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            if errors:
                return errors[-1].removeprefix("error: ")
        return ""

    def pids(self) -> dict[str, int]:
        """Process ids of the running processes."""
        return {c.name: c.process.pid for c in self._children if c.process is not None}

    def running(self) -> set[str]:
        """Names of the running processes."""
        return {c.name for c in self._children if c.process and c.process.poll() is None}

    # ---- starting and stopping

    def _spawn(self, child: Child) -> None:
        child.restart_at = None
        with child.log.open("ab") if child.log else nullcontext() as log:
            child.process = subprocess.Popen(
                [sys.executable, "-m", *child.command, "--parent", str(os.getpid())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=child.descriptors,
                start_new_session=True,  # Ctrl-C reaches this process only
            )

    def stop(self) -> None:
        """Stop every process and remove the run folder."""
        running = [c.process for c in self._children if c.process is not None]
        for process in running:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 1.0
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        if self._children:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        self._children = []

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _sweep() -> None:
    """Remove the run folders of processes that were killed before they could do so."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        with suppress(OSError, ValueError):
            if folder.stat().st_uid == os.getuid() and not process_runs(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)
