"""Doors: how writers get into a pool that they write to by NIXL, and how its owner shuts them out.

    writer                                  owner's thread
    ------                                  --------------
    Open(epoch, writer) --- tcp, CURVE ---> a new agent with the pool registered: the writer's door
                        <--- Opened ------- its metadata, and where the slabs are
    WRITE, WRITE, ...  ==== tcp, RDMA ====> pool
    Close ------------------------------->  the door is destroyed

Each writer has a door of its own. What a writer has begun to send may arrive long after it has given up,
or died: bytes wait in sockets and switches. A door that is destroyed ends that, for one writer and at
once; only then may the blocks it could write into be used again. A writer that opens a second door
loses the first. NIXL encrypts nothing and asks nobody who he is, so CURVE guards the metadata: without it
nobody knows where to write.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack
import torch
import zmq

from baton.errors import TransferError
from baton.transfer.base import Owner
from baton.transfer.curve import CurveKeys, secure_server
from baton.transfer.nixl_agent import Agent, interface_of

VERSION = 1
MAX_DOORS = 256
SCRATCH_BYTES = 1 << 20
HEADER_BYTES = 1 << 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Open:
    """From a writer: it wants a door to the pool of this epoch."""

    epoch: str
    writer: str

    def encode(self) -> bytes:
        """In msgpack."""
        return msgpack.packb([VERSION, "open", self.epoch, self.writer])


@dataclass(frozen=True, slots=True)
class Opened:
    """From the owner: its agent's metadata, the addresses of slabs and of SCRATCH_BYTES for probes."""

    metadata: bytes
    slabs: tuple[int, ...]
    scratch: int

    def encode(self) -> bytes:
        """In msgpack."""
        return msgpack.packb([VERSION, "opened", self.metadata, list(self.slabs), self.scratch])


@dataclass(frozen=True, slots=True)
class Refused:
    """From the owner: no door."""

    why: str

    def encode(self) -> bytes:
        """In msgpack."""
        return msgpack.packb([VERSION, "refused", self.why])


@dataclass(frozen=True, slots=True)
class Close:
    """From a writer: it has ended."""

    def encode(self) -> bytes:
        """In msgpack."""
        return msgpack.packb([VERSION, "close"])


def decode(message: bytes) -> Open | Opened | Refused | Close | None:
    """None unless it is well-formed and of this version."""
    if len(message) > HEADER_BYTES:
        return None
    try:
        fields = msgpack.unpackb(message)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    match fields:
        case [1, "open", str(epoch), str(writer)]:
            return Open(epoch, writer)
        case [1, "opened", bytes(metadata), [*slabs], scratch] if _naturals(scratch, *slabs):
            return Opened(metadata, tuple(slabs), scratch)
        case [1, "refused", str(why)]:
            return Refused(why)
        case [1, "close"]:
            return Close()
    return None


def _naturals(*values: object) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


@dataclass(slots=True)
class _Door:
    agent: Agent
    identity: bytes  # of the connection that asked for it
    let_in: bool = False


@dataclass(slots=True)
class Doors:
    """The owner's side. A thread answers writers; the methods are for any thread."""

    slabs: Sequence[torch.Tensor]  # one per layer
    owner: Owner
    endpoint: str = field(init=False)
    server_key: bytes = field(init=False)
    _doors: dict[str, _Door] = field(init=False, default_factory=dict)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _scratch: torch.Tensor = field(init=False)
    _device: str | None = field(init=False)
    _opened: int = field(init=False, default=0)
    _context: zmq.Context[zmq.Socket[bytes]] = field(init=False)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        """TransferError if the owner has no address, no keys, or NIXL does not work here."""
        host, keys = self.owner.bind_host, self.owner.keys
        if host is None or host in ("*", "0.0.0.0", "::", "[::]"):
            raise TransferError(f"nixl needs one address of this machine to bind, got {host}")
        if keys is None:
            raise TransferError("nixl needs CURVE keys, by which writers are let in")
        self.server_key = keys.public
        self._scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8)
        self._device = interface_of(host.strip("[]"))
        Agent("check", [self._scratch], self._device, thread=False).close()  # does NIXL work here?
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        try:
            self._bind(socket, host, keys)
        except zmq.ZMQError as error:
            socket.close(0)
            self._context.term()
            raise TransferError(f"cannot open a socket for NIXL's writers: {error}") from error
        self._thread = threading.Thread(target=self._serve, args=(socket,), daemon=True)
        self._thread.start()

    def _bind(self, socket: zmq.Socket[bytes], host: str, keys: CurveKeys) -> None:
        socket.linger, socket.maxmsgsize = 0, HEADER_BYTES
        secure_server(socket, keys)
        host = f"[{host}]" if ":" in host and "[" not in host else host
        socket.setsockopt(zmq.IPV6, int("[" in host))
        socket.bind(f"tcp://{host}:*")
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def let_in(self, writer: str) -> None:
        """What it may write to is granted from now on: shut_out() destroys this door."""
        with self._lock:
            if writer in self._doors:
                self._doors[writer].let_in = True

    def shut_out(self, writer: str) -> None:
        """Nothing that the writer sent by a door through which it was let in arrives any more. A door
        that it has opened since stays: nothing was granted for that one yet."""
        with self._lock:
            if writer in self._doors and self._doors[writer].let_in:
                self._doors.pop(writer).agent.close()

    def close(self) -> None:
        """Shut all out."""
        self._context.term()
        self._thread.join()
        with self._lock:
            for door in self._doors.values():
                door.agent.close()
            self._doors.clear()
        self.slabs = ()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        try:
            while True:
                identity, *parts = socket.recv_multipart()
                match decode(parts[0]) if len(parts) == 1 else None:
                    case Open() as order:
                        socket.send_multipart([identity, self._open(order, identity).encode()])
                    case Close():
                        self._close_of(identity)
        except zmq.ContextTerminated:
            pass
        finally:
            socket.close(0)

    def _open(self, order: Open, identity: bytes) -> Opened | Refused:
        if order.epoch != self.owner.epoch:
            return Refused(f"the pool is in epoch {self.owner.epoch}, not in {order.epoch}")
        self._opened += 1
        name = f"{self.owner.epoch}.{self._opened}"
        try:
            agent = Agent(name, [*self.slabs, self._scratch], self._device, thread=True)
        except TransferError as error:
            logger.warning("no door for %s: %s", order.writer, error)
            return Refused(str(error))
        with self._lock:
            ended = self._doors.pop(order.writer, None)
            if ended is None and len(self._doors) >= MAX_DOORS:
                ended = self._doors.pop(next(iter(self._doors)))  # the oldest; it attaches again
            if ended is not None:
                ended.agent.close()
            self._doors[order.writer] = _Door(agent, identity)
        addresses = tuple(each.data_ptr() for each in self.slabs)
        return Opened(agent.metadata, addresses, self._scratch.data_ptr())

    def _close_of(self, identity: bytes) -> None:
        with self._lock:
            for writer, door in list(self._doors.items()):
                if door.identity == identity:
                    self._doors.pop(writer).agent.close()
