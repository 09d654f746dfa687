"""A decode worker's pool with one way to it, and what a writer does: what tests of transports share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import zmq

from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.region import Arrival, Receipt
from baton.transfer.base import Export, Link
from baton.transfer.in_place import NAME as IN_PLACE
from baton.transfer.in_place import InPlaceExport, InPlaceLink
from baton.transfer.pieces import rows
from baton.transfer.registry import CurveKeys, make_exports, open_link
from baton.transfer.slabs import Slabs, allocate_slabs
from tests.patience import PATIENCE_S, patiently

LAYOUT = KVLayout((LayerShape(2, 8, 8), LayerShape(1, 12, 4), LayerShape(2, 8, 8)), 4, "float32")
BLOCKS = 24
PUBLIC, SECRET = zmq.curve_keypair()
KEYS = CurveKeys(PUBLIC, SECRET)


@dataclass
class Owner:
    """A decode worker's pool and one way to it. `clock` is what its export takes for the time."""

    slabs: Slabs
    export: Export
    epoch: str = "epoch-1"
    granted: int = 0
    links: int = 0

    def grant(self, *blocks: int, expect: bool = True) -> Grant:
        self.granted += 1
        grant = Grant("d0", self.epoch, f"r{self.granted}#0", self.granted, blocks)
        if expect:
            self.export.expect(grant)
        return grant

    def link(self) -> Link:
        if self.export.region.transport == IN_PLACE:  # another process has no such link
            return InPlaceLink(LAYOUT, self.slabs.tensors, epoch=self.epoch)
        region, self.links = self.export.region, self.links + 1
        # NIXL says by this that nothing more is taken; of the others it only ends a hang.
        deadline_s = 10.0 if region.transport == "nixl" else PATIENCE_S
        asked = {"writer": f"p{self.links}", "wanted": region.transport, "deadline_s": deadline_s}
        return open_link([region], LAYOUT, device="cpu", keys=KEYS, **asked)

    def settle(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """Poll as a loop would: wake when something comes."""
        for _ in patiently("the fill settles"):
            more = self.export.poll()
            arrival = self.export.arrival(grant, receipt, needed)
            if arrival is not Arrival.PENDING:
                return arrival
            if not more:
                zmq.select(list(self.export.wakeups()), [], [], 1)
        raise AssertionError("patiently() ends no loop")

    def drain(self, link: Link, block: int) -> None:
        """Everything the link has sent so far has been looked at: a good fill after it is READY."""
        grant = self.grant(block)
        assert self.settle(grant, fill(link, grant, reference(99))) is Arrival.READY
        self.export.retire(grant)

    def close(self) -> None:
        self.export.close()
        self.slabs.close()


def make_owner(transport: str, folder: Path) -> Owner:
    slabs = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=True)
    if transport == IN_PLACE:
        return Owner(slabs, InPlaceExport(slabs, epoch="epoch-1"))
    (export,) = make_exports(
        [transport], slabs, epoch="epoch-1", run_dir=folder, bind_host="127.0.0.2", keys=KEYS
    )
    return Owner(slabs, export)


def reference(seed: int) -> list[torch.Tensor]:
    """A writer's own pool, full of noise."""
    generator = torch.Generator().manual_seed(seed)
    sizes = LAYOUT.slab_bytes(BLOCKS)[:-1]
    return [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]


def fill(
    link: Link,
    grant: Grant,
    source: list[torch.Tensor],
    blocks: Sequence[int] | None = None,
    *,
    finish: bool = True,
) -> Receipt:
    """Fill blocks b of the grant with blocks b of `source`, in chunks; the last block of each chunk
    is pushed half done at first, as chunked prefill does."""
    blocks = list(grant.blocks if blocks is None else blocks)
    half_done = [torch.zeros_like(slab) for slab in source]
    for start in range(0, len(blocks), 3):
        chunk = blocks[start : start + 3]
        for layer in range(len(source)):
            write(link, grant, layer, half_done[layer], chunk[-1:])
            write(link, grant, layer, source[layer], chunk)
    return link.finish(grant, blocks) if finish else Receipt(0, b"", 0.0)


def write(link: Link, grant: Grant, layer: int, slab: torch.Tensor, blocks: Sequence[int]) -> None:
    if link.slabs is None:
        link.push(grant, layer, slab, blocks, blocks)
        return
    ours, theirs = (rows(LAYOUT, layer, each) for each in (slab, link.slabs[layer]))
    blocks = list(blocks)
    theirs.keys[blocks], theirs.values[blocks] = ours.keys[blocks], ours.values[blocks]
    link.push(grant, layer, link.slabs[layer], blocks, blocks)


def holds(owner: Owner, source: list[torch.Tensor], blocks: Sequence[int]) -> bool:
    """Are these blocks of the pool byte for byte those of `source`?"""
    blocks = list(blocks)
    for layer, slab in enumerate(source):
        pool, wanted = (rows(LAYOUT, layer, each) for each in (owner.slabs.tensors[layer], slab))
        same = pool.keys[blocks].equal(wanted.keys[blocks])
        if not (same and pool.values[blocks].equal(wanted.values[blocks])):
            return False
    return True


def snapshot(owner: Owner) -> list[torch.Tensor]:
    return [slab.clone() for slab in owner.slabs.tensors]


def unchanged(owner: Owner, before: list[torch.Tensor]) -> bool:
    return all(now.equal(then) for now, then in zip(owner.slabs.tensors, before, strict=True))
