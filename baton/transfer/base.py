"""The one protocol every KV transport speaks. Decode owns the memory and exports it; prefill links
to it and fills the blocks it was granted.

    decode worker (owner)                            prefill worker (writer)
    ---------------------                            -----------------------
    export = Export over the pool's slabs
    export.region  ------ Hello, router, Attach ----->  link = open(region)
    export.expect(grant)  --- Reserved, Fill -------->  for each layer, as soon as it is computed:
    export.poll()  <====== KV bytes ==================      link.push(grant, layer, ...)
    export.arrival(grant, receipt)  <--- Filled, Start ---  receipt = link.finish(grant, blocks)
    export.retire(grant)

Where memory is shared (shm; CUDA IPC on one GPU) `link.slabs` is the decode pool itself: prefill
computes into it, `push` has nothing to move and `receipt.moved_bytes` is 0. Elsewhere prefill
computes into a pool of its own and pushes block by block, layer by layer.

A block counts as filled when its stamp is the grant's generation: the writer stamps in place, or
the receiver does after it has checked the digest. Rules for every transport, kept by one contract
suite (tests/torch/test_transfer_contract.py):

1. What `arrival` calls READY is byte for byte what was pushed under that very grant.
2. After `retire(grant)`, nothing that still arrives under it touches the pool, where bytes pass
   through the owner (frames, pinned). Where the writer writes by itself, the block table
   (baton/kv/blocks.py) keeps the blocks in quarantine until the writer is known to have stopped.
3. Nothing blocks without a deadline, and nothing fails silently: a TransferError says what and why,
   and what an owner had to drop is counted in `dropped` by reason.

An export belongs to one epoch. When the worker starts a new one, close the exports and make them
anew over the same slabs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import zmq

from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.curve import CurveKeys

__all__ = ["Arrival", "Export", "Link", "Owner", "Receipt", "Region", "Writer"]


@dataclass(frozen=True, slots=True)
class Owner:
    """What an export may need from the process that owns the pool."""

    epoch: str
    run_dir: Path | None = None  # a folder of mode 0700
    bind_host: str | None = None  # an address of this machine
    keys: CurveKeys | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """What a link may need from the process that writes."""

    device: torch.device
    keys: CurveKeys | None = None
    deadline_s: float = 10.0  # without progress


class Export(Protocol):
    """The owner's side."""

    region: Region
    dropped: Counter[str]  # reason -> how often: what was refused or thrown away

    def expect(self, grant: Grant) -> None:
        """The blocks of this grant will be written: their stamps are cleared."""

    def poll(self) -> bool:
        """Take in what has arrived: 8 MiB at most in one call, and never waits. True: there is more
        to do, call again before you wait for anything."""

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """Sockets to wait on beside one's own: when one is readable, poll() has something to do."""

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """Is everything the receipt speaks of in the pool, as it was sent? `needed` are the blocks
        that must be filled (all of the grant's if None: a grant may hold room for generation too,
        which no fill touches). PENDING turns into BAD by itself when nothing has moved for long."""

    def retire(self, grant: Grant) -> None:
        """The grant is over: forget it, drop what still arrives under it."""

    def close(self) -> None:
        """Give the transport's resources back. The pool stays the owner's."""


class Link(Protocol):
    """The writer's side."""

    transport: str
    why: str  # what was preferred to this transport and could not be used; empty if nothing
    slabs: Sequence[torch.Tensor] | None  # the decode pool itself where memory is shared, else None

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Move blocks `source` of this layer's `slab` (uint8 [slab bytes], the writer's own pool)
        into blocks `target` of the decode pool. A block may be pushed again: the last push wins."""

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Everything pushed or written in place under this grant is complete; `blocks` are the
        target blocks it filled. All that the owner needs is on its way when this returns."""

    def abandon(self, grant: Grant) -> None:
        """Nothing more will be written under this grant."""

    def probe(self) -> float:
        """GB/s of a few MiB moved just now; 0 where nothing has to be moved."""

    def close(self) -> None:
        """Unmap, disconnect. The owner's memory is not touched."""
