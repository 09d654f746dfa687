"""KV transports, each declared once. A new one is a module of baton/transfer/ and an entry here.

The module has two functions: export(slabs, owner) -> Export and link(region, layout, writer) -> Link
(baton/transfer/base.py). Options, ranking, quarantine and displayed names follow from the entry. No
torch: the router and the commands read this too.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from baton.errors import InputError

CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True, slots=True)
class Transport:
    """A transport of KV blocks from a prefill worker into a decode worker's pool."""

    name: str
    title: str  # displayed name
    devices: tuple[str, ...]  # pools on these offer it under "auto"
    writes_by_itself: bool  # the writer writes to the pool directly: its blocks need quarantine
    module: str  # of baton.transfer
    export: str = "export"  # the function of the module that exports a pool
    needs: str = ""  # field of Owner that must be set
    choice: str | None = None  # the value of --kv-transport that selects it; None: no option does
    queued: bool = False  # its writer may have to wait for the owner, so a thread does
    by_name: bool = False  # it sends clear text to other hosts: never used under "auto"
    modules: tuple[str, ...] = ()  # one of these must be installed
    shuts_out: bool = False  # the owner can shut a writer out: nothing of it arrives from then on


TRANSPORTS = (
    Transport("shm", "shared memory", (CPU,), True, "shm", choice="shm"),
    Transport("cuda_ipc", "CUDA IPC", (CUDA,), True, "cuda_ipc", choice="cuda_ipc"),
    Transport("pinned", "pinned host memory", (CUDA,), True, "pinned", choice="pinned"),
    Transport(
        *("frames", "ZeroMQ frames", (CPU, CUDA), False, "frames"),
        needs="run_dir",
        choice="frames",
        queued=True,
    ),
    Transport(
        *("frames_tcp", "ZeroMQ frames over tcp", (CPU, CUDA), False, "frames"),
        export="export_tcp",
        needs="bind_host",
        choice="frames",
        queued=True,
    ),
    Transport(
        *("nixl", "NIXL", (CPU,), True, "nixl"),
        needs="bind_host",
        choice="nixl",
        queued=True,
        by_name=True,
        modules=("nixl_cu13", "nixl_cu12"),
        shuts_out=True,
    ),
)
"""Best first: a writer uses the first exported transport that works."""

RANK = {each.name: rank for rank, each in enumerate(TRANSPORTS)}
CHOICES = ("auto", *dict.fromkeys(each.choice for each in TRANSPORTS if each.choice))


def transport(name: str) -> Transport | None:
    """The transport of this name; None if this version has no such transport."""
    return TRANSPORTS[RANK[name]] if name in RANK else None


def selects(choice: str, name: str) -> bool:
    """Whether --kv-transport `choice`, or a transport's own name, allows this transport."""
    known = transport(name)
    if choice == "auto":
        return known is None or not known.by_name
    return choice == name or (known is not None and choice == known.choice)


def writes_by_itself(name: str) -> bool:
    """True for an unknown transport: quarantine is always safe."""
    known = transport(name)
    return known is None or known.writes_by_itself


def shuts_out(name: str) -> bool:
    """Whether an owner can shut out a writer that uses this transport, wherever that is."""
    known = transport(name)
    return known is not None and known.shuts_out


def check_installed(choice: str) -> None:
    """InputError if --kv-transport names a transport whose package is not installed."""
    for each in TRANSPORTS:
        if each.modules and choice == each.choice and not any(map(find_spec, each.modules)):
            raise InputError(
                f"--kv-transport {choice}: {each.title} is not installed; install this package's "
                f"extra {choice!r}, or {' or '.join(each.modules).replace('_', '-')} by pip"
            )
