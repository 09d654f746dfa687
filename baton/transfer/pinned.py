"""Pinned: for GPUs of one host that cannot access each other. The owner keeps a mirror of its pool in
shared host pages. Both sides register the pages with CUDA, so copies run at bus speed and overlap
with computation.

    writer's GPU --copy stream--> mirror block b          (b: the granted target block)
                                  stamp of b in the mirror, once everything is there
    owner: mirror block b --copy stream--> pool block b, and only then the digest over the mirror;
           if it equals the receipt's, the stamp of b in the pool

Hashing after the copy is deliberate. A stray write before the copy is still in the mirror when it
is hashed; a later one can spoil a good fill, but cannot make a bad one pass. On the CPU the same
code runs without registration, streams and events.

The mirror is as large as the pool. Its pages are allocated when first written, and registration
touches all of them. On CUDA an export therefore refuses to take more than a quarter of the
available memory.
"""

import logging
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import zmq

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.base import Owner, Writer
from baton.transfer.checks import Address, check_grant, check_push, check_source, in_order
from baton.transfer.device import PROBE_BYTES, CopyStream, RegisteredPages, available_memory
from baton.transfer.pieces import Rows, Stretch, all_rows, block_bytes, rows, stretches
from baton.transfer.shm import open_shared, shared_region
from baton.transfer.slabs import Slabs, allocate_slabs
from baton.transfer.stamps import Digest, Expected, Stamps, lacking

logger = logging.getLogger(__name__)

POLL_BYTES = 8 << 20
STRETCH_BYTES = 1 << 20


@dataclass(slots=True)
class _Job:
    """A fill that is being copied from the mirror into the pool."""

    grant: Grant
    receipt: Receipt
    blocks: list[int]
    work: Iterator[int]  # yields the bytes of each step, 0 while a copy is pending
    verdict: Arrival = Arrival.PENDING


class PinnedExport:
    """The owner's side: a mirror of its pool. See base.Export."""

    def __init__(self, slabs: Slabs, owner: Owner, *, deadline_s: float = 10.0) -> None:
        size = sum(slabs.layout.slab_bytes(slabs.blocks))
        if slabs.device.type == "cuda" and size > available_memory() // 4:
            raise TransferError(
                f"a host mirror of the KV pool takes {size >> 20} MiB, and that is more than a "
                f"quarter of the {available_memory() >> 20} MiB available"
            )
        self.dropped: Counter[str] = Counter()
        self._layout = slabs.layout
        self._mirror = allocate_slabs(
            slabs.layout, slabs.blocks, "cpu", shared=True, folder=owner.run_dir
        )
        self.region = shared_region("pinned", self._mirror, owner.epoch)
        self._pages = RegisteredPages(self._mirror.tensors, slabs.device)
        self._copies = CopyStream(slabs.device, deadline_s)
        self._pool, self._pool_rows = slabs.tensors, all_rows(slabs.layout, slabs.tensors)
        self._mirror_rows = all_rows(slabs.layout, self._mirror.tensors)
        self._stamps = slabs.stamps
        self._mirror_stamps = Stamps(self._mirror.tensors[-1])
        self._expected = Expected(owner.epoch, slabs.blocks)
        self._jobs: dict[int, _Job] = {}

    def expect(self, grant: Grant) -> None:
        """Clear the stamps of the grant's blocks, in the pool and in the mirror."""
        self._expected.add(grant)
        self._stamps.clear(grant)
        self._mirror_stamps.write(grant.blocks, 0)

    def poll(self) -> bool:
        """Copy and hash up to 8 MiB of the fills that arrival() was called for."""
        left = POLL_BYTES
        for job in self._jobs.values():
            while job.verdict is Arrival.PENDING and left > 0:
                took = self._advance(job)
                left -= took
                if not took:  # a copy is still running
                    break
        return any(job.verdict is Arrival.PENDING for job in self._jobs.values())

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None: arrival() starts the work, and poll() returns whether some is left."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """The first call starts the copy into the pool; PENDING until poll() has finished it."""
        if grant not in self._expected:
            return self._bad("unknown")
        job = self._jobs.get(grant.generation)
        if job is None:
            blocks = self._mirror_stamps.filled(grant)
            if lacking(grant, blocks, needed):
                return self._bad("unfilled")
            self._pages.register_or_warn()
            job = _Job(grant, receipt, blocks, self._take_in(grant, receipt, blocks))
            self._jobs[grant.generation] = job
        if job.receipt != receipt or lacking(grant, job.blocks, needed):
            return self._bad("receipt")
        return job.verdict

    def retire(self, grant: Grant) -> None:
        """See base.Export."""
        if grant in self._expected:
            self._expected.drop(grant)
            self._jobs.pop(grant.generation, None)

    def close(self) -> None:
        """Free the mirror; the pool stays."""
        self._copies.wait()
        self._jobs.clear()
        self._pages.release()
        self._mirror_rows, self._pool_rows, self._pool = [], [], ()
        del self._stamps, self._mirror_stamps
        self._mirror.close()

    def _advance(self, job: _Job) -> int:
        """Do one step and return its bytes; 0 while a copy is pending, and at the end."""
        try:
            return next(job.work, 0)
        except TransferError as error:
            logger.warning("%s: KV did not reach the pool: %s", job.grant.run, error)
            job.verdict = self._bad("lost")
            return 0

    def _take_in(self, grant: Grant, receipt: Receipt, blocks: list[int]) -> Iterator[int]:
        """Copy, hash and stamp, in steps that yield their bytes."""
        parts = mirror_parts(self._layout, blocks)
        for layer, part in parts:
            self._copies.copy(self._pool_rows[layer], part, self._mirror_rows[layer])
            yield part.count * block_bytes(self._layout, layer) // 2
        yield from self._copies.pending()
        digest = Digest(grant, "pinned")
        for layer, part in parts:
            add_part(digest, layer, part, self._mirror_rows[layer])
            yield part.count * block_bytes(self._layout, layer) // 2
        job = self._jobs[grant.generation]
        if digest.value == receipt.digest:
            self._stamps.write(blocks, grant.generation)
            job.verdict = Arrival.READY
        else:
            job.verdict = self._bad("digest")

    def _bad(self, reason: str) -> Arrival:
        self.dropped[reason] += 1
        return Arrival.BAD


@dataclass(slots=True)
class _Outgoing:
    pushed: list[set[int]]  # per layer
    moved: int = 0
    seconds: float = 0.0


class PinnedLink:
    """The writer's side: the owner's mirror, mapped. See base.Link."""

    transport = "pinned"
    slabs: Sequence[torch.Tensor] | None = None

    def __init__(self, region: Region, layout: KVLayout, writer: Writer) -> None:
        self.why = ""
        self._layout, self._device = layout, writer.device
        self._epoch = Address(region).field("epoch", str)
        self.mirror = tuple(open_shared(region, layout))
        self._pages = RegisteredPages(self.mirror, writer.device)
        self._pages.register()
        self.rows = all_rows(layout, self.mirror)
        self._stamps: Stamps | None = Stamps(self.mirror[-1])
        self._copies = CopyStream(writer.device, writer.deadline_s)
        self._outgoing: dict[int, _Outgoing] = {}

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """See base.Link. On CUDA the copy is still running when this returns: do not change the
        source blocks until finish(), or until they are pushed again."""
        started = time.perf_counter()
        check_push(grant, self._layout, layer, source, target)
        outgoing, view = self._of(grant), rows(self._layout, layer, slab)
        check_source(source, len(view.keys))
        self._copies.after_computing()
        for stretch in stretches(source, target, len(source)):
            self._copies.copy(self.rows[layer], stretch, view)
        outgoing.pushed[layer].update(target)
        outgoing.moved += len(target) * block_bytes(self._layout, layer)
        outgoing.seconds += time.perf_counter() - started

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Wait for the copies, hash the mirror's blocks and stamp them."""
        started = time.perf_counter()
        ordered = in_order(grant, blocks)
        outgoing = self._of(grant)
        missing = [b for b in ordered if not all(b in pushed for pushed in outgoing.pushed)]
        if missing:
            raise TransferError(
                f"{grant.run}: blocks {missing[:4]} were not pushed for every layer"
            )
        self._copies.wait()
        digest = Digest(grant, "pinned")
        for layer, part in mirror_parts(self._layout, ordered):
            add_part(digest, layer, part, self.rows[layer])
        assert self._stamps is not None  # checked by _of()
        self._stamps.write(ordered, grant.generation)
        del self._outgoing[grant.generation]
        seconds = outgoing.seconds + time.perf_counter() - started
        return Receipt(outgoing.moved, digest.value, seconds, self.transport)

    def abandon(self, grant: Grant) -> None:
        """Wait until no copy of this fill is running."""
        if self._outgoing.pop(grant.generation, None) is not None:
            self._copies.wait()

    def probe(self) -> float:
        """GB/s of 8 MiB from this device into pages registered like the mirror's."""
        target = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
        pages = RegisteredPages((target,), self._device)
        pages.register()
        try:
            source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=self._device)
            return self._copies.speed(source, target)
        finally:
            pages.release()

    def close(self) -> None:
        """Unregister and unmap the mirror."""
        self._copies.wait()
        self._pages.release()
        self.mirror, self.rows, self._stamps = (), [], None

    def _of(self, grant: Grant) -> _Outgoing:
        check_grant(grant, self._epoch, closed=self._stamps is None)
        fresh = _Outgoing([set() for _ in self._layout.layers])
        return self._outgoing.setdefault(grant.generation, fresh)


def mirror_parts(layout: KVLayout, blocks: Sequence[int]) -> list[tuple[int, Stretch]]:
    """(layer, stretch) of these blocks in all layers, in the order in which both sides hash them."""
    longest = [max(1, STRETCH_BYTES // block_bytes(layout, i)) for i in range(len(layout.layers))]
    return [
        (layer, stretch)
        for layer, count in enumerate(longest)
        for stretch in stretches(blocks, blocks, count)
    ]


def add_part(digest: Digest, layer: int, part: Stretch, mirror: Rows) -> None:
    """Hash one stretch of one layer."""
    where = slice(part.target, part.target + part.count)
    label = struct.pack("<III", layer, part.target, part.count)
    digest.add(label, mirror.keys[where].view(-1), mirror.values[where].view(-1))


export, link = PinnedExport, PinnedLink  # see baton/kv/transports.py
