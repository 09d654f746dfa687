"""Cluster: this machine's processes, started by the very commands of the README, restarted when they
die, stopped whatever happens.

    run folder (mode 0700, ours)/   router.sock   kv-*.sock   logs/router.log   logs/prefill-0.log ...

Every child ends with this process, even after SIGKILL (baton/host.py). A child that leaves with an
exit code that says "it will never work" (2, 3, 4, 6) is not tried again: its last words are raised.
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
from types import TracebackType

from baton.clock import Clock, monotonic
from baton.errors import (
    BatonError,
    InputError,
    ModelError,
    OutOfMemory,
    ProtocolError,
    WorkerLost,
)
from baton.host import core_numbers, process_runs
from baton.package import ROOT
from baton.topology import Topology, threads_per_worker
from baton.wire.messages import ClusterInfo

PREFIX = "baton-"
BACK_OFF_S = (0.0, 0.5, 1.0, 2.0)
CRASH_LOOP = (5, 60.0)
"""So many deaths of one process within so many seconds, and the cluster gives up."""

FINAL: dict[int, type[BatonError]] = {
    error.exit_code: error for error in (InputError, ModelError, ProtocolError, OutOfMemory)
}


@dataclass(frozen=True, slots=True)
class Beside:
    """A process that belongs to a cluster without being a part of it: it gets the router's address,
    may speak to the terminal, and inherits these descriptors."""

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


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Everything a cluster is started with."""

    model: str
    topology: Topology
    batch_size: int
    batch_window_ms: float = 10.0
    dtype: str = "auto"
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_transport: str = "auto"
    max_num_batched_tokens: int = 2048
    speculative_model: str | None = None
    num_speculative_tokens: int = 4
    prefix_caching: bool = True


class Cluster:
    """Use as a context manager: what it started is gone when the block is left."""

    mends = True  # a router that dies is started again (see baton/client/batch.py)

    def __init__(self, options: ClusterOptions, *, clock: Clock = monotonic) -> None:
        self.options = options
        self.router_restarts = 0
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
        """One more process, from now on."""
        command = [*beside.command, "--router", self.address]
        child = Child(beside.name, command, None, beside.descriptors)
        self._children.append(child)
        self._spawn(child)

    def commands(self) -> list[tuple[str, list[str]]]:
        """Names and command lines: what one would type by hand in as many terminals."""
        options = self.options
        model = (
            str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
        )
        router = ["router", "--address", self.address, "--model", model]
        router += ["--batch-size", str(options.batch_size)]
        router += ["--batch-window-ms", f"{options.batch_window_ms:g}"]
        if options.topology.colocated:
            router.append("--colocated")
        shared = ["--router", self.address, "--model", model, "--dtype", options.dtype]
        shared += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
        shared += ["--kv-transport", options.kv_transport]
        if options.max_model_len is not None:
            router += ["--max-model-len", str(options.max_model_len)]
            shared += ["--max-model-len", str(options.max_model_len)]
        decode = ["--max-num-seqs", str(options.batch_size)]
        decode += [] if options.prefix_caching else ["--no-enable-prefix-caching"]
        if options.kv_cache_memory_bytes is not None:
            decode += ["--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes)]
        if options.speculative_model is not None:
            decode += ["--speculative-model", options.speculative_model]
            decode += ["--num-speculative-tokens", str(options.num_speculative_tokens)]
        commands = [("router", router)]
        threads = str(threads_per_worker(options.topology))
        for role, devices in (
            ("prefill", options.topology.prefill_devices),
            ("decode", options.topology.decode_devices),
        ):
            for index, device in enumerate(devices):
                name = f"{role}-{index}"
                command = [f"{role}_worker", *shared, "--device", device, "--name", name]
                if device == "cpu" and not core_numbers():  # else the router hands out cores
                    command += ["--threads", threads]
                if role == "decode":
                    command += decode
                commands.append((name, command))
        return commands

    # ---- while it runs

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        """Look after the processes: call it often. Restarts what has died, and kills what the router
        has given up. Returns what there is to tell the user; raises what cannot be mended."""
        notes = []
        if info is not None:
            notes += self._kill_given_up(info)
        now = self._clock()
        for child in self._children:
            if child.process is not None and (code := child.process.poll()) is not None:
                notes.append(self._died(child, code, now))
            if child.process is None and child.restart_at is not None and now >= child.restart_at:
                self._spawn(child)
                if child.name == "router":
                    self.router_restarts += 1
        return notes

    def _kill_given_up(self, info: ClusterInfo) -> list[str]:
        """A worker that had joined and is listed no more is stalled or wedged: a new one is better."""
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
        if child.name == "router":  # its members start anew with the next one
            for other in self._children:
                other.joined = False
        last_words = self.last_words(child.name)
        if code in FINAL:
            raise FINAL[code](last_words or f"{child.name} left with exit code {code}")
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
        """The last error line a process printed, without its "error: "."""
        with suppress(OSError):
            lines = (self.run_dir / "logs" / f"{name}.log").read_text(errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            if errors:
                return errors[-1].removeprefix("error: ")
        return ""

    def pids(self) -> dict[str, int]:
        """The processes that run now."""
        return {c.name: c.process.pid for c in self._children if c.process is not None}

    def running(self) -> set[str]:
        """Names of those that have not ended."""
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
                start_new_session=True,  # Ctrl-C is ours to handle, once
            )

    def stop(self) -> None:
        """End every process, at once, and remove the run folder."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _sweep() -> None:
    """Remove run folders of ours whose process was killed before it could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        with suppress(OSError, ValueError):
            if folder.stat().st_uid == os.getuid() and not process_runs(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Beside", "Cluster", "ClusterOptions", "Topology"]
