"""Which transports there are, and which one a pair of workers uses.

The owner exports its pool in every way it can; the writer takes the first of them that works for
it, in this order, and keeps what it passed over and why in `link.why`:

    shm       CPU, same host                nothing is copied
    cuda_ipc  GPU, same host                nothing is copied on the same GPU, else peer copies
    pinned    GPU without peer access       through pages of the host that both GPUs can reach
    frames    same host                     ZeroMQ messages over ipc
    frames_tcp  anywhere                    ZeroMQ messages over tcp with CURVE
    fake      tests of the control plane    moves nothing
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from baton.errors import TransferError
from baton.host import host_id
from baton.kv.layout import KVLayout
from baton.kv.region import Region
from baton.transfer.base import Export, Link
from baton.transfer.curve import CurveKeys
from baton.transfer.slabs import Slabs

__all__ = ["TRANSPORTS", "CurveKeys", "host_id", "make_exports", "open_link", "probe"]

TRANSPORTS = ("shm", "cuda_ipc", "pinned", "frames", "frames_tcp", "fake")
AUTO = {
    "cpu": ("shm", "frames", "frames_tcp"),
    "cuda": ("cuda_ipc", "pinned", "frames", "frames_tcp"),
}

logger = logging.getLogger(__name__)


def make_exports(
    kinds: Sequence[str] | Literal["auto"],
    slabs: Slabs,
    *,
    epoch: str,
    run_dir: Path | None,
    bind_host: str | None = None,
    keys: CurveKeys | None = None,
) -> list[Export]:
    """The pool's exports, best first. `run_dir`: a folder of mode 0700, for ipc; `bind_host`: an
    address of this machine, for tcp, which needs `keys`. With "auto", what cannot be offered is
    logged and left out; a kind that is named must work."""
    exports: list[Export] = []
    given = {"frames": run_dir, "frames_tcp": bind_host}
    possible = [kind for kind in AUTO[slabs.device.type] if given.get(kind, kind) is not None]
    for kind in possible if kinds == "auto" else kinds:
        try:
            exports.append(_export(kind, slabs, epoch, run_dir, bind_host, keys))
        except TransferError as error:
            if kinds != "auto":
                for export in exports:
                    export.close()
                raise
            logger.warning("the KV pool is not offered by %s: %s", kind, error)
    if not exports:
        raise TransferError("the KV pool cannot be offered by any transport; see the log for why")
    return exports


def _export(
    kind: str,
    slabs: Slabs,
    epoch: str,
    run_dir: Path | None,
    bind_host: str | None,
    keys: CurveKeys | None,
) -> Export:
    match kind:
        case "shm":
            from baton.transfer.shm import ShmExport

            return ShmExport(slabs, epoch=epoch)
        case "cuda_ipc":
            from baton.transfer.cuda_ipc import CudaIpcExport

            return CudaIpcExport(slabs, epoch=epoch)
        case "pinned":
            from baton.transfer.pinned import PinnedExport

            return PinnedExport(slabs, epoch=epoch, folder=run_dir)
        case "frames":
            from baton.transfer.frames import FramesExport

            return FramesExport(slabs, epoch=epoch, run_dir=run_dir)
        case "frames_tcp":
            from baton.transfer.frames import FramesExport

            if bind_host is None:
                raise TransferError("frames_tcp needs an address of this machine to bind")
            return FramesExport(slabs, epoch=epoch, bind_host=bind_host, keys=keys)
        case "fake":
            from baton.transfer.fake import FakeExport

            return FakeExport(slabs, epoch=epoch)
    raise TransferError(f"no KV transport is called {kind!r}; there are {', '.join(TRANSPORTS)}")


def open_link(
    regions: Sequence[Region],
    layout: KVLayout,
    *,
    device: torch.device | str,
    writer: str,
    wanted: str = "auto",
    keys: CurveKeys | None = None,
    deadline_s: float = 10.0,
) -> Link:
    """The best way from `writer` on `device` to the pool behind these regions. Waits 2 s at most
    for each socket to answer. Later, a push gives up after `deadline_s` without any progress."""
    device = torch.device(device)
    offered = sorted(regions, key=_rank)
    passed_over = []
    for region in offered:
        if wanted not in ("auto", region.transport, region.transport.removesuffix("_tcp")):
            continue
        try:
            link = _open(region, layout, device, keys, deadline_s)
        except TransferError as error:
            passed_over.append(f"{region.transport}: {error}")
            continue
        link.why = "; ".join(passed_over)
        if passed_over:
            logger.warning("%s moves KV by %s, because: %s", writer, link.transport, link.why)
        return link
    names = ", ".join(region.transport for region in offered) or "nothing"
    raise TransferError(
        f"{writer} on {device} finds no way to the KV pool: wanted {wanted}, offered {names}"
        + "".join(f"; {reason}" for reason in passed_over)
    )


def _rank(region: Region) -> int:
    known = region.transport in TRANSPORTS
    return TRANSPORTS.index(region.transport) if known else len(TRANSPORTS)


def _open(
    region: Region,
    layout: KVLayout,
    device: torch.device,
    keys: CurveKeys | None,
    deadline_s: float,
) -> Link:
    match region.transport:
        case "shm":
            from baton.transfer.shm import ShmLink

            if device.type != "cpu":
                raise TransferError(f"the pool is on the CPU, the writer on {device}")
            return ShmLink(region, layout)
        case "cuda_ipc":
            from baton.transfer.cuda_ipc import CudaIpcLink

            return CudaIpcLink(region, layout, device=device, deadline_s=deadline_s)
        case "pinned":
            from baton.transfer.pinned import PinnedLink

            return PinnedLink(region, layout, device=device, deadline_s=deadline_s)
        case "frames" | "frames_tcp":
            from baton.transfer.frames import FramesLink

            connect_s = min(2.0, deadline_s)
            return FramesLink(region, layout, keys=keys, deadline_s=deadline_s, connect_s=connect_s)
        case "fake":
            from baton.transfer.fake import FakeLink

            return FakeLink(region)
    raise TransferError("this version does not know this transport")


def probe(link: Link) -> float:
    """Measured GB/s, for the launch line; 0 where nothing has to be moved."""
    return link.probe()
