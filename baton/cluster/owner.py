"""Owner: one process of a cluster on the node where this runs, started and watched by the same supervisor
(supervisor.py) that looks after all processes of one machine.

It imports nothing of Ray: baton/cluster/on_ray.py makes an actor of it. The process ends with the actor,
even after SIGKILL (baton/host.py), so an actor that is started elsewhere never has a twin.
"""

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.cluster.child import Child
from baton.cluster.options import ClusterOptions
from baton.cluster.run_folder import RunFolder, write_missing
from baton.cluster.supervisor import Beside, Cluster
from baton.errors import BatonError
from baton.package import own_version
from baton.wire.messages import ClusterInfo
from baton.wire.records import ProcessDown

HOST, KEYS, API_KEYS = "{host}", "{keys}", "{api-keys}"
"""In a command: the node's address, the folder of CURVE keys, the file of API keys."""


@dataclass(frozen=True, slots=True)
class Order:
    """A process to start on some node. It holds keys, so it is not shown."""

    name: str
    command: tuple[str, ...]
    options: ClusterOptions
    version: str  # of the package, which must be the same on every node
    keys: Mapping[str, bytes] = field(repr=False)  # file names and contents
    api_keys: bytes = field(default=b"", repr=False)

    @property
    def role(self) -> str:
        """router, server, prefill or decode."""
        return self.name.partition("-")[0]


@dataclass(frozen=True, slots=True)
class Look:
    """What an owner reports."""

    host: str  # the node's address
    node: str  # the node's id
    runs: bool
    down: tuple[ProcessDown, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = 0  # of a process for which a restart here cannot help
    why: str = ""


class OwnedProcess(Cluster):
    """A cluster of one process, whose router may be on another node."""

    def __init__(
        self, order: Order, command: list[str], prepare: Callable[[], object] = lambda: None
    ) -> None:
        """`prepare` is called before each start."""
        super().__init__(replace(order.options, spare_worker=False), lasting=True)
        self._name, self._command, self._prepare = order.name, command, prepare

    def commands(self) -> list[tuple[str, list[str]]]:
        return [] if self._name == "server" else [(self._name, self._command)]

    @property
    def ends_for_one(self) -> bool:
        """Whoever placed it here decides what that means for the service, and may place it elsewhere."""
        return True

    def start(self) -> None:
        """The server prints where its owner prints, as it does on one machine."""
        super().start()
        if self._name == "server":
            self.launch(Beside(self._name, self._command))

    def _spawn(self, child: Child) -> None:
        self._prepare()
        super()._spawn(child)


class Owner:
    """Call look() regularly: it restarts the process if it died."""

    def __init__(self, order: Order, host: str, node: str) -> None:
        """Starts the process. `host`: this node's address."""
        self._order, self._host, self._node = order, host, node
        self._folder = RunFolder()
        self._process: OwnedProcess | None = None
        self._refused = ""
        if order.version != (own := own_version()):
            self._refused = f"baton {own} is installed on {host}, and {order.version} was started"
            return
        places = {HOST: host, KEYS: str(self._keys), API_KEYS: str(self._api_keys)}
        command = [places.get(word, word) for word in order.command]
        self._process = OwnedProcess(order, command, self._write_missing)
        self._process.start()

    @property
    def _keys(self) -> Path:
        return self._folder.path / "keys"

    @property
    def _api_keys(self) -> Path:
        return self._folder.path / "api-keys"

    def _write_missing(self) -> None:
        """A cleaner of old files may have removed some, or all."""
        self._folder.make()
        self._keys.mkdir(mode=0o700, exist_ok=True)
        contents = {self._keys / name: content for name, content in self._order.keys.items()}
        for path, content in (contents | {self._api_keys: self._order.api_keys}).items():
            write_missing(path, content)

    def look(self, info: ClusterInfo | None = None) -> Look:
        """Restart the process if it died. `info`: what the router says, if that is certain."""
        notes: list[str] = []
        code, why = 2 if self._refused else 0, self._refused
        if self._process is not None:
            try:
                notes = self._process.check(info)
            except BatonError as error:
                code, why = error.exit_code, str(error)
        down = self._process.down() if self._process is not None else ()
        return Look(
            self._host,
            self._node,
            self._process is not None and self._order.name in self._process.running(),
            tuple(replace(each, log=f"{self._host}:{each.log}") for each in down),
            tuple(notes),
            code,
            why,
        )

    def leave(self) -> None:
        """Let the process finish what it does and end (SIGTERM); it is not started again."""
        if self._process is not None and (pid := self._process.let_end(self._order.name)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def stop(self) -> None:
        """End the process now and remove its files."""
        if self._process is not None:
            self._process.stop()
        self._folder.remove()
