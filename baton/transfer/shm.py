"""Shared memory: on one machine's CPU the writer maps the owner's pool and computes into it.

Nothing is copied. The region is a path like /proc/PID/fd/N: any process of the same user that sees
the same processes can open it, nobody else can, and there is no name to leave behind.
"""

import time
from collections import Counter
from collections.abc import Sequence

import torch
import zmq

from baton.errors import TransferError
from baton.host import host_id
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Arrival, Plain, Receipt, Region
from baton.transfer.address import Address
from baton.transfer.base import Owner, Writer
from baton.transfer.pieces import check_in_place, check_push, digest_of_blocks, in_order
from baton.transfer.slabs import Slabs, map_shared
from baton.transfer.stamps import Expected, Stamps, judge


class ShmExport:
    """The pool's own memory, for writers on this host."""

    def __init__(self, slabs: Slabs, *, epoch: str) -> None:
        self.region = shared_region("shm", slabs, epoch)
        self.dropped: Counter[str] = Counter()
        self._stamps = Stamps(slabs.tensors[-1])
        self._expected = Expected(epoch, slabs.blocks)

    def expect(self, grant: Grant) -> None:
        """See base.py."""
        self._expected.add(grant)
        self._stamps.write(grant.blocks, 0)

    def poll(self) -> bool:
        """The writer's stores are visible at once: there is nothing to take in."""
        return False

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """READY or BAD, never PENDING: the stamps were written before the receipt was."""
        wrong: str | None = "unknown"
        if grant in self._expected:
            wrong = judge(self._stamps, grant, receipt, transport="shm", needed=needed)
        if wrong is None:
            return Arrival.READY
        self.dropped[wrong] += 1
        return Arrival.BAD

    def retire(self, grant: Grant) -> None:
        """See base.py."""
        self._expected.drop(grant)

    def close(self) -> None:
        """Nothing to give back: the memory and its file are the pool's."""


class ShmLink:
    """The owner's pool, mapped."""

    transport = "shm"

    def __init__(self, region: Region, layout: KVLayout) -> None:
        self.why = ""
        self._layout = layout
        self._epoch = Address(region).text("epoch")
        self._mapped = tuple(open_shared(region, layout))
        self.slabs: Sequence[torch.Tensor] | None = self._mapped
        self._stamps = Stamps(self._mapped[-1])

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Nothing to move; refused if the caller computed somewhere else than in `slabs`."""
        check_push(grant, self._layout, layer, source, target)
        if self.slabs is None:
            raise TransferError("this link is closed")
        check_in_place(self.slabs[layer], slab, source, target)

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Stamp the blocks: the last store of this fill."""
        started = time.perf_counter()
        if self.slabs is None:
            raise TransferError("this link is closed")
        if grant.epoch != self._epoch:
            raise TransferError(f"{grant.run}: granted in another life of {grant.worker}")
        ordered = in_order(grant, blocks)
        self._stamps.write(ordered, grant.generation)
        digest = digest_of_blocks(grant, "shm", ordered)
        return Receipt(0, digest, time.perf_counter() - started, self.transport)

    def abandon(self, grant: Grant) -> None:
        """Without stamps the blocks count for nothing."""

    def probe(self) -> float:
        """Nothing has to be moved."""
        return 0.0

    def close(self) -> None:
        """The mapping ends with the last tensor over it."""
        self.slabs, self._mapped = None, ()
        del self._stamps


def shared_region(transport: str, slabs: Slabs, epoch: str) -> Region:
    """Where the file behind these slabs is found."""
    if slabs.shared is None:
        raise TransferError(f"{transport} needs a pool in shared memory; this one is private")
    file = slabs.shared
    address: Plain = {
        "host": host_id(),
        "path": file.path,
        "size": file.size,
        "token": file.token,
        "epoch": epoch,
    }
    return Region(transport, slabs.layout.fingerprint, slabs.blocks, address)


def open_shared(region: Region, layout: KVLayout) -> list[torch.Tensor]:
    """Map what shared_region() described."""
    address = Address(region)
    address.check_layout(layout)
    address.check_host()
    return map_shared(
        address.text("path"),
        address.number("size"),
        address.data("token"),
        layout,
        region.blocks,
    )


def export(slabs: Slabs, owner: Owner) -> ShmExport:
    """See baton/kv/transports.py."""
    return ShmExport(slabs, epoch=owner.epoch)


def link(region: Region, layout: KVLayout, writer: Writer) -> ShmLink:
    """See baton/kv/transports.py."""
    if writer.device.type != "cpu":
        raise TransferError(f"the pool is on the CPU, the writer on {writer.device}")
    return ShmLink(region, layout)
