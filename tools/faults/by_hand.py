"""ByHand: a service whose processes are started one by one, as a user types them into terminals.

Nobody restarts or kills them here, so a stopped worker can come back, and workers can join and leave.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from baton.wire.keys import make_keys
from tools.faults.service import STOP_S, Service, memory_mib


class ByHand(Service):
    """A Service without a supervisor. `workers`: extra options by name, such as prefill-0."""

    def __init__(
        self,
        workers: Mapping[str, Sequence[object]],
        *,
        address: str | None = None,
        common: Sequence[object] = (),
        router: Sequence[object] = (),
        server: Sequence[object] = (),
        worker_address: str | None = None,
        failpoints: Sequence[str] = (),
        keys: bool = False,
        keep: Path | None = None,
    ) -> None:
        """`address`: the router's, by default a socket in the folder. `worker_address`: where workers
        look for it, by default there. `common`: options of every process. `keys`: make CURVE keys and
        use them, as tcp addresses need."""
        roles = [name.partition("-")[0] for name in workers]
        expected = {role: roles.count(role) for role in set(roles)}
        super().__init__(failpoints=failpoints, expected=expected, keep=keep)
        self._address, self._worker_address = address, worker_address
        self._workers, self._common, self._router = workers, list(common), router
        self._server = server
        self._keys = keys
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        return self._address or f"ipc://{self.folder / 'tmp' / 'router.sock'}"

    def _start(self) -> None:
        if self._keys:
            make_keys(self.folder / "keys")
            self._common += ["--keys", self.folder / "keys"]
        self.start("router", "router", "--address", self.address, *self._router)
        for name, options in self._workers.items():
            self.join(name, *options)
        self.start(
            "server", "baton.server", "--router", self.address, "--port", self.port,
            "--log-level", "error", *self._server,
        )  # fmt: skip

    def join(self, name: str, *options: object) -> None:
        """Start a worker, such as prefill-1."""
        module = f"{name.partition('-')[0]}_worker"
        router = self._worker_address or self.address
        light = ("--threads", 1, "--device", "cpu")
        self.start(name, module, "--router", router, "--name", name, *light, *options)

    def start(self, name: str, module: str, *options: object) -> None:
        """Start `python -m MODULE` under this name."""
        self._started[name] = self._spawn("-m", module, *options, *self._common)

    def leave(self, name: str, within_s: float = STOP_S) -> int:
        """SIGTERM, and wait: the exit code. Raises subprocess.TimeoutExpired."""
        process = self._started.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def pids(self) -> dict[str, int]:
        return {name: p.pid for name, p in self._started.items() if p.poll() is None}

    @property
    def main_pid(self) -> int:
        return os.getpid()  # nobody else starts processes; its own memory is not the service's

    @property
    def exit_code(self) -> int | None:
        ended = {n: p.poll() for n, p in self._started.items() if p.poll() is not None}
        return next(iter(ended.values()), None)

    def run_folder(self) -> Path | None:
        return None  # the folder is ours, and is removed with everything in it

    def stop(self) -> None:
        self._keep_logs()
        for process in self._started.values():
            for number in (signal.SIGCONT, signal.SIGTERM):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
        deadline = time.monotonic() + STOP_S
        for name, process in self._started.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.leftovers.append(
                    f"{name} did not end after SIGTERM ({memory_mib(process.pid):.0f} MiB)"
                )
                process.kill()
                process.wait()
        if self._started:
            self._look_for_leftovers()
        self._started = {}
        self._stack.close()
