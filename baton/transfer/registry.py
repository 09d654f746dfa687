"""Opens the transports that baton/kv/transports.py declares.

The owner exports its pool by every transport it can. The writer tries them in the order of the
declarations, takes the first that works, and records in `link.why` why the others did not.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from baton.errors import TransferError
from baton.kv.layout import KVLayout
from baton.kv.region import Region
from baton.kv.transports import RANK, TRANSPORTS, Transport, selects, transport
from baton.transfer.base import Export, Link, Owner, Writer
from baton.transfer.curve import CurveKeys
from baton.transfer.slabs import Slabs

__all__ = ["CurveKeys", "make_exports", "open_link"]

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
    address of this machine, for tcp, which needs `keys`. "auto" logs a transport that fails and
    leaves it out. TransferError if a named transport fails, or none is left."""
    owner = Owner(epoch, run_dir, bind_host, keys)
    possible = [
        each.name
        for each in TRANSPORTS
        if slabs.device.type in each.devices
        and (not each.needs or getattr(owner, each.needs) is not None)
    ]
    exports: list[Export] = []
    for kind in possible if kinds == "auto" else kinds:
        try:
            exports.append(_export(kind, slabs, owner))
        except TransferError as error:
            if kinds != "auto":
                for export in exports:
                    export.close()
                raise
            logger.warning("the KV pool is not exported by %s: %s", kind, error)
    if not exports:
        raise TransferError("the KV pool cannot be exported by any transport, see the log")
    return exports


def _export(kind: str, slabs: Slabs, owner: Owner) -> Export:
    known = transport(kind)
    if known is None:
        names = ", ".join(each.name for each in TRANSPORTS)
        raise TransferError(f"no KV transport is called {kind!r}; there are {names}")
    export: Export = getattr(_module(known), known.export)(slabs, owner)
    return export


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
    """The best link from `writer` on `device` to the pool behind these regions. Waits at most 2 s for
    each socket. Later, a push raises TransferError after `deadline_s` without progress. TransferError
    if no transport works, with the reason for each. `wanted`: "auto", a value of --kv-transport or a
    transport's name."""
    device = torch.device(device)
    offered = sorted(regions, key=lambda region: RANK.get(region.transport, len(RANK)))
    passed_over = []
    for region in offered:
        if not selects(wanted, region.transport):
            continue
        try:
            link = _open(region, layout, Writer(device, keys, deadline_s))
        except TransferError as error:
            passed_over.append(f"{region.transport}: {error}")
            continue
        link.why = "; ".join(passed_over)
        if passed_over:
            logger.warning("%s moves KV by %s; not used: %s", writer, link.transport, link.why)
        return link
    names = ", ".join(region.transport for region in offered) or "nothing"
    raise TransferError(
        f"{writer} on {device} cannot reach the KV pool: wanted {wanted}, offered {names}"
        + "".join(f"; {reason}" for reason in passed_over)
    )


def _open(region: Region, layout: KVLayout, writer: Writer) -> Link:
    known = transport(region.transport)
    if known is None:
        raise TransferError("this version has no such transport")
    link: Link = _module(known).link(region, layout, writer)
    return link


def _module(known: Transport) -> Any:
    """Imported at first use, so that a worker loads only the transports it needs."""
    return import_module(f"baton.transfer.{known.module}")
