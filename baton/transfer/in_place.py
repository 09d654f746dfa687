"""In place: the writer computes directly into the owner's pool, so push() copies nothing.

    in_place   owner and writer are one process (baton/local.py) and use the same tensors
    shm        the writer maps the owner's file: the same two classes over mapped tensors (shm.py)
    cuda_ipc   the same export; its link also copies between GPUs (cuda_ipc.py)

Within one process the link is made from the owner's Slabs. No other process has those, so
baton/kv/transports.py does not list `in_place`.
"""

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
import zmq

from baton import failpoint
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.checks import check_grant, check_in_place, check_push, in_order
from baton.transfer.slabs import Slabs
from baton.transfer.stamps import Expected, Stamps, digest_of_blocks, lacking

NAME = "in_place"


class InPlaceExport:
    """The owner's side of every transport whose writer stamps the blocks itself. See base.Export."""

    def __init__(self, slabs: Slabs, *, epoch: str, region: Region | None = None) -> None:
        """`region`: how another process reaches this pool; by default only this one can."""
        self.region = region or Region(
            NAME, slabs.layout.fingerprint, slabs.blocks, {"epoch": epoch}
        )
        self.dropped: Counter[str] = Counter()
        self._stamps = slabs.stamps
        self._expected = Expected(epoch, slabs.blocks)

    def expect(self, grant: Grant) -> None:
        """Clear the stamps of the grant's blocks."""
        self._expected.add(grant)
        self._stamps.clear(grant)

    def poll(self) -> bool:
        """False: the writer's stores are complete and visible before it sends a receipt."""
        return False

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None: nothing arrives on a socket."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """READY or BAD, never PENDING: the stamps were written before the receipt was sent."""
        if grant not in self._expected:
            return self._bad("unknown")
        filled = self._stamps.filled(grant)
        if lacking(grant, filled, needed):
            return self._bad("unfilled")
        if receipt.digest != digest_of_blocks(grant, self.region.transport, filled):
            return self._bad("digest")
        return Arrival.READY

    def retire(self, grant: Grant) -> None:
        """See base.Export."""
        self._expected.drop(grant)

    def close(self) -> None:
        """Releases nothing: the memory belongs to the pool."""

    def _bad(self, reason: str) -> Arrival:
        self.dropped[reason] += 1
        return Arrival.BAD


class InPlaceLink:
    """The writer's side, over the owner's tensors. See base.Link."""

    def __init__(
        self,
        layout: KVLayout,
        tensors: Sequence[torch.Tensor],
        *,
        epoch: str,
        transport: str = NAME,
    ) -> None:
        """`tensors`: the pool's slabs, uint8 [slab bytes], one per layer, then the stamps."""
        self.transport, self.why = transport, ""
        self.slabs: Sequence[torch.Tensor] | None = tensors
        self._layout, self._epoch = layout, epoch
        self._stamps: Stamps | None = Stamps(tensors[-1])

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Copies nothing. TransferError if the caller computed elsewhere than into `slabs`."""
        check_push(grant, self._layout, layer, source, target)
        check_grant(grant, self._epoch, closed=self.slabs is None)
        assert self.slabs is not None
        check_in_place(self.slabs[layer], slab, source, target)

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Stamp the blocks: the last store of this fill. The caller has waited for the device."""
        started = time.perf_counter()
        check_grant(grant, self._epoch, closed=self._stamps is None)
        assert self._stamps is not None
        assert self.slabs is not None
        ordered = in_order(grant, blocks)
        self._stamps.write(ordered, grant.generation)
        failpoint.hit("prefill.stamp", partial(_stamp, self.slabs[-1], ordered))
        digest = digest_of_blocks(grant, self.transport, ordered)
        return Receipt(0, digest, time.perf_counter() - started, self.transport)

    def abandon(self, grant: Grant) -> None:
        """Writes nothing: blocks without stamps count as not filled."""

    def probe(self) -> float:
        """0: no bytes have to be moved."""
        return 0.0

    def close(self) -> None:
        """Memory is unmapped with the last tensor that uses it; the engine may still hold one."""
        self.slabs = self._stamps = None


def _stamp(stamps: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """The bytes of the first block's stamp, uint8 [8]."""
    return stamps.view(-1, 8)[blocks[0]]
