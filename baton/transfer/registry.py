"""Opens the transports that baton/kv/transports.py declares.

The owner exports its pool by every transport it can. The writer tries them in the order of the
declarations, takes the first that works, and records in `link.why` why the others did not.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from baton.errors import TransferError
from baton.kv.layout import KVLayout
from baton.kv.region import Region
from baton.kv.transports import RANK, TRANSPORTS, Transport, selects, transport, writes_by_itself
from baton.transfer.base import Export, Link, Owner, Writer
from baton.transfer.courier import Courier
from baton.transfer.curve import CurveKeys
from baton.transfer.slabs import Slabs

__all__ = ["Courier", "CurveKeys", "let_in", "make_exports", "open_link", "open_way", "shut_out"]

PATIENCE_S = 5.0
"""So long an owner may take nothing before a courier gives its way up. What was on it is filled
elsewhere."""

logger = logging.getLogger(__name__)


@runtime_checkable
class Guarded(Protocol):
    """An export that can shut a writer out, wherever that is (Transport.shuts_out)."""

    def let_in(self, writer: str) -> None:
        """This writer may be given grants from now on."""

    def shut_out(self, writer: str) -> None:
        """Nothing that this writer has begun to write since let_in() arrives any more."""


def let_in(exports: Sequence[Export], writer: str) -> None:
    """See Guarded."""
    for export in exports:
        if isinstance(export, Guarded):
            export.let_in(writer)


def shut_out(exports: Sequence[Export], writer: str) -> None:
    """See Guarded."""
    for export in exports:
        if isinstance(export, Guarded):
            export.shut_out(writer)


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
        and not each.by_name
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
    offered = _offered(regions, wanted)
    link, passed_over = _first(
        offered, layout, Writer(torch.device(device), keys, deadline_s, writer), writer
    )
    if link is None:
        raise _unreachable(regions, passed_over, f"{writer} on {device}", wanted)
    return link


def open_way(
    regions: Sequence[Region],
    layout: KVLayout,
    *,
    epoch: str,
    device: torch.device | str,
    writer: str,
    wanted: str = "auto",
    keys: CurveKeys | None = None,
) -> Link | Courier:
    """As open_link(), for a worker's loop: a transport that may wait for its peer is opened and used by a
    Courier, if no other works. `epoch`: of the pool."""
    possible = Writer(torch.device(device), keys, PATIENCE_S, writer)
    offered = _offered(regions, wanted)
    direct = [region for region in offered if not _queued(region)]
    queued = [region for region in offered if _queued(region)]
    link, passed_over = _first(direct, layout, possible, writer)
    if link is not None:
        return link
    error = _unreachable(regions, passed_over, f"{writer} on {device}", wanted)
    if not queued:
        raise error

    def open_later() -> Link:
        link, also = _first(queued, layout, possible, writer, passed_over)
        if link is None:
            raise _unreachable(regions, also, f"{writer} on {device}", wanted)
        return link

    by_itself = any(writes_by_itself(region.transport) for region in queued)
    return Courier(open_later, layout, epoch, writes=by_itself)


def _queued(region: Region) -> bool:
    known = transport(region.transport)
    return known is not None and known.queued


def _offered(regions: Sequence[Region], wanted: str) -> list[Region]:
    """Those that are wanted, best first."""
    offered = sorted(regions, key=lambda region: RANK.get(region.transport, len(RANK)))
    return [region for region in offered if selects(wanted, region.transport)]


def _first(
    offered: Sequence[Region],
    layout: KVLayout,
    possible: Writer,
    writer: str,
    before: Sequence[str] = (),
) -> tuple[Link | None, list[str]]:
    """The first link that works, and why those before it do not. `before`: why others do not."""
    passed_over = list(before)
    for region in offered:
        try:
            link = _open(region, layout, possible)
        except TransferError as error:
            passed_over.append(f"{region.transport}: {error}")
            continue
        link.why = "; ".join(passed_over)
        if passed_over:
            logger.warning("%s moves KV by %s; not used: %s", writer, link.transport, link.why)
        return link, passed_over
    return None, passed_over


def _unreachable(
    regions: Sequence[Region], passed_over: Sequence[str], who: str, wanted: str
) -> TransferError:
    ranked = sorted(regions, key=lambda region: RANK.get(region.transport, len(RANK)))
    names = ", ".join(region.transport for region in ranked) or "nothing"
    known = [transport(region.transport) for region in regions]
    remote = any(each is not None and each.needs == "bind_host" for each in known)
    hint = "; to be reached from other hosts the decode worker needs --kv-host ADDRESS"
    return TransferError(
        f"{who} cannot reach the KV pool: wanted {wanted}, offered {names}"
        + "".join(f"; {reason}" for reason in passed_over)
        + ("" if remote or not regions else hint)
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
