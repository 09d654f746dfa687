"""NIXL agents: the calls of NVIDIA's transfer library that the transport needs, with our errors.

An agent has registered memory, an address, and a thread that takes in what peers write into that memory;
their writes need no call on this side. Destroying it closes its connections: nothing lands from then on.

This uses the bindings below NIXL's Python API, because that API lets the agent's thread poll without a
pause, which takes a core from whatever else runs here. With POLL_US it sleeps until a socket wakes it.
"""

import contextlib
import fcntl
import importlib
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from baton.errors import TransferError

POLL_US = 100_000
SIOCGIFADDR = 0x8915
WITHOUT_SHARED_MEMORY = "^sysv,posix,cma,xpmem"
"""UCX transports by default. One host's processes use shm.py; with UCX's, transfers have hung."""

Memory = tuple[int, int]
"""Address and bytes."""

_creating = threading.Lock()


@cache
def bindings() -> Any:
    """The bindings of the installed wheel. TransferError if there is none."""
    major = (torch.version.cuda or "").split(".")[0]
    modules = sorted(("nixl_cu13", "nixl_cu12"), key=lambda name: not name.endswith(major or "13"))
    for name in modules:
        try:
            return importlib.import_module(f"{name}._bindings")
        except ModuleNotFoundError as error:
            if error.name != name:
                raise TransferError(f"NIXL cannot be used: {error}") from error
        except ImportError as error:
            raise TransferError(f"NIXL cannot be used: {error}") from error
    raise TransferError("NIXL is not installed: pip install nixl-cu12, or nixl-cu13")


@cache
def errors() -> tuple[type[Exception], ...]:
    """What its calls raise: many classes, with only Exception in common."""
    found = [each for name, each in vars(bindings()).items() if name.startswith("nixl")]
    return tuple(e for e in found if isinstance(e, type) and issubclass(e, Exception))


class Agent:
    """For one thread at a time."""

    def __init__(
        self, name: str, tensors: Sequence[torch.Tensor], device: str | None, *, thread: bool
    ) -> None:
        """Registers these tensors, which stay where they are. `device`: the network interface to use;
        None, or UCX_NET_DEVICES in the environment: what UCX finds. `thread`: take in what peers write;
        without it write() and done() move what this agent writes."""
        self._nixl = bindings()
        wanted = {"UCX_TLS": WITHOUT_SHARED_MEMORY, "UCX_NET_DEVICES": device or "all"}
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = thread, POLL_US
        with _said("an agent cannot be created"), _environment(wanted):
            self._agent = self._nixl.nixlAgent(name, config)
            self._backend = [self._agent.createBackend("UCX", {})]
        memory = [(each.data_ptr(), each.numel(), 0, "") for each in tensors]
        self._registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, memory)
        self._kept = tuple(tensors)
        with _said("memory cannot be registered"):
            self._agent.registerMem(self._registered, self._backend)
            self.metadata: bytes = self._agent.getLocalMD()
        self._requests: set[int] = set()

    def connect(self, metadata: bytes) -> str:
        """Make another agent known and return its name."""
        with _said("the owner's agent cannot be reached"):
            name: bytes = self._agent.loadRemoteMD(metadata)
            self._agent.makeConnection(name.decode(), self._backend)
            return name.decode()

    def write(self, agent: str, source: Sequence[Memory], target: Sequence[Memory]) -> int:
        """Begin to write source[i] into target[i] of the other agent. Returns a request for done()."""
        ours, theirs = (
            self._nixl.nixlXferDList(self._nixl.DRAM_SEG, [(*each, 0) for each in side])
            for side in (source, target)
        )
        with _said("the owner's memory cannot be written"):
            request: int = self._agent.createXferReq(
                self._nixl.NIXL_WRITE, ours, theirs, agent, b"", self._backend
            )
            self._requests.add(request)
            self._agent.postXferReq(request)
        return request

    def done(self, request: int) -> bool:
        """All of it is in the owner's memory; the request is over. TransferError if it failed."""
        with _said("the owner's memory cannot be written"):
            status = self._agent.getXferStatus(request)
            if status == self._nixl.NIXL_IN_PROG:
                return False
            if status != self._nixl.NIXL_SUCCESS:
                raise TransferError(f"a write ended with {status}")
            self._requests.discard(request)
            self._agent.releaseXferReq(request)
        return True

    def close(self) -> None:
        """Destroy the agent: connections are closed, unfinished writes end somewhere."""
        if self._agent is None:
            return
        for request in self._requests:  # those that cannot be cancelled end with the agent
            with contextlib.suppress(*errors()):
                self._agent.releaseXferReq(request)
        with contextlib.suppress(*errors()):
            self._agent.deregisterMem(self._registered, self._backend)
        self._agent, self._kept = None, ()


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Variables for UCX, which reads them when an agent is created. Those of the user stay."""
    with _creating:
        ours = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """NIXL's errors as TransferError."""
    try:
        yield
    except errors() as error:
        raise TransferError(f"{what}: {type(error).__name__} {error}".rstrip()) from error


def interface_of(address: str) -> str | None:
    """The network interface of this host with this IP address; None if it is not found."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_DGRAM)[0]
        ip, version = found[4][0], found[0]
        if version == socket.AF_INET6:
            packed = socket.inet_pton(version, str(ip).split("%")[0]).hex()
            lines = Path("/proc/net/if_inet6").read_text().splitlines()
            return next((line.split()[5] for line in lines if line.startswith(packed)), None)
        if str(ip).startswith("127."):
            return "lo"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # it has no address
                    asked = struct.pack("256s", name.encode())
                    given = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, asked)
                    if socket.inet_ntoa(given[20:24]) == ip:
                        return name
    except OSError:
        pass
    return None


def way_to(host: str) -> str | None:
    """The network interface by which this host sends to another; None if it is not found."""
    try:
        version, kind, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(version, kind) as unused:
            unused.connect(where)  # sends nothing
            return interface_of(str(unused.getsockname()[0]))
    except OSError:
        return None
