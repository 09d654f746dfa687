"""The protocol of every KV transport. Decode owns the memory and exports it; prefill opens a link to
it and fills the blocks it was granted.

    decode worker (owner)                            prefill worker (writer)
    ---------------------                            -----------------------
    export = Export over the pool's slabs
    export.region  ------ Hello, router, Attach ----->  link = open(region)
    export.expect(grant)  --- Reserved, Fill -------->  for each layer, as soon as it is computed:
    export.poll()  <====== KV bytes ==================      link.push(grant, layer, ...)
    export.arrival(grant, receipt)  <--- Filled, Start ---  receipt = link.finish(grant, blocks)
    export.retire(grant)

Where memory is shared (shm; CUDA IPC on one GPU) `link.slabs` is the decode pool itself: prefill
computes into it, `push` copies nothing and `receipt.moved_bytes` is 0. Otherwise prefill computes
into a pool of its own and pushes block by block, layer by layer.

A block is filled when its stamp equals the grant's generation. The writer stamps in place, or the
receiver stamps after it has checked the digest. Every transport keeps these rules, and one contract
suite tests them (tests/torch/test_transfer_contract.py):

1. What `arrival` calls READY is byte for byte what was pushed under that very grant.
2. After `retire(grant)`, nothing that still arrives under it touches the pool, if bytes pass through
   the owner (frames, pinned). If the writer writes by itself, the block table (baton/kv/blocks.py)
   keeps the blocks in quarantine until the writer is known to have stopped.
3. Every wait has a deadline and every failure is reported: a TransferError names the cause, and
   what an owner drops is counted in `dropped` by reason.

An export belongs to one epoch. When the worker starts a new epoch, close the exports and make new
ones over the same slabs.

To add a transport:

1. Write one module in this folder, with the two classes below and, by these names,
   `export(slabs: Slabs, owner: Owner) -> Export` and
   `link(region: Region, layout: KVLayout, writer: Writer) -> Link`: functions, or the classes
   themselves as in pinned.py. Both raise TransferError if the
   transport does not work here; under "auto" the next one is tried. in_place.py is the shortest
   example. If the writer stamps the blocks itself, reuse its InPlaceExport, as shm.py does.
   checks.py, pieces.py and stamps.py hold the parts that transports share.
2. Add one Transport to TRANSPORTS in baton/kv/transports.py, at its rank. The option --kv-transport,
   the ranking and quarantine follow from it.
3. Add its name to TRANSPORTS in tests/torch/test_transfer_contract.py and run that suite.
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
    """What an export may use of the process that owns the pool."""

    epoch: str
    run_dir: Path | None = None  # a folder of mode 0700
    bind_host: str | None = None  # an address of this machine
    keys: CurveKeys | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """What a link may use of the process that writes."""

    device: torch.device
    keys: CurveKeys | None = None
    deadline_s: float = 10.0  # longest wait without progress
    name: str = ""  # unique to this process


class Export(Protocol):
    """The owner's side. All methods return at once; close() may wait for a running copy."""

    region: Region
    dropped: Counter[str]  # how often something was rejected, by reason

    def expect(self, grant: Grant) -> None:
        """Announce a grant: its blocks count as not filled from now on. TransferError if the grant is
        of another epoch, or contradicts the pool or another grant."""

    def poll(self) -> bool:
        """Process what has arrived, at most about 8 MiB, without waiting. True if there is more to do:
        call again before waiting for anything."""

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """Sockets for the caller's event loop: when one is readable, call poll()."""

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """Whether the pool holds what the receipt says, as it was sent. `needed`: the blocks that
        must be filled; None means all of the grant. A grant may also contain blocks for generation,
        which prefill does not fill. PENDING turns into LOST after a deadline without progress."""

    def retire(self, grant: Grant) -> None:
        """End the grant: drop what still arrives under it."""

    def close(self) -> None:
        """Release the transport's resources. The pool is not touched."""


class Link(Protocol):
    """The writer's side. Methods raise TransferError on a closed link, or a grant of another epoch."""

    transport: str
    why: str  # why better transports were not used; empty if there is none
    slabs: Sequence[torch.Tensor] | None  # the decode pool if memory is shared, otherwise None

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Copy blocks `source` of this layer's `slab` (uint8 [slab bytes], the writer's pool) into
        blocks `target` of the decode pool. A block may be pushed again; the last push wins."""

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Complete the fill; `blocks` are the target blocks it has filled. When this returns, all
        bytes are written or queued for sending."""

    def abandon(self, grant: Grant) -> None:
        """Give the fill up. When this returns, nothing more is written under this grant."""

    def probe(self) -> float:
        """Bandwidth in GB/s, measured with a few MiB; 0 if push copies nothing."""

    def close(self) -> None:
        """Unmap or disconnect. The owner's memory is not touched."""
