"""The one protocol every KV transport speaks. Decode owns the memory and exports it; prefill links
to it and fills the blocks it was granted.

    decode worker (owner)                            prefill worker (writer)
    ---------------------                            -----------------------
    export = Export over the pool's slabs
    export.region  ------ Hello, router, Attach ----->  link = open(region)
    export.expect(grant)  --- Reserved, Fill -------->  for each layer, as soon as it is computed:
    export.poll()  <====== KV bytes ==================      link.push(grant, layer, ...)
    export.arrival(grant, receipt)  <--- Filled, Start ---  receipt = link.finish(grant)
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
3. Nothing blocks without a deadline, and nothing fails silently: a TransferError says what and why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch

from baton.kv.grant import Grant

Plain = Mapping[str, str | int | bytes | bool | list[int] | list[bytes]]


@dataclass(frozen=True, slots=True)
class Region:
    """Where a decode worker's pool can be reached by one transport. Plain data: it travels in Hello."""

    transport: str
    layout: str  # KVLayout.fingerprint
    blocks: int
    address: Plain  # what this transport's open() needs: a path, a handle, a socket address


class Arrival(StrEnum):
    """What the owner can say of a grant's KV."""

    READY = "ready"
    PENDING = "pending"  # bytes are still on their way; ask again after poll()
    BAD = "bad"  # not what was sent: fill it again


@dataclass(frozen=True, slots=True)
class Receipt:
    """The writer's word on one finished fill. `digest` is bound to the grant and the bytes moved."""

    moved_bytes: int
    digest: bytes
    seconds: float  # spent in push and finish, as the writer saw it


class Export(Protocol):
    """The owner's side."""

    region: Region

    def expect(self, grant: Grant) -> None:
        """The blocks of this grant will be written: their stamps are cleared."""

    def poll(self) -> None:
        """Take in what has arrived. Never waits."""

    def arrival(self, grant: Grant, receipt: Receipt) -> Arrival:
        """Is everything the receipt speaks of in the pool, as it was sent?"""

    def retire(self, grant: Grant) -> None:
        """The grant is over: forget it, drop what still arrives under it."""

    def close(self) -> None:
        """Give the transport's resources back. The pool stays the owner's."""


class Link(Protocol):
    """The writer's side."""

    transport: str
    slabs: Sequence[torch.Tensor] | None  # the decode pool itself where memory is shared, else None

    def push(
        self, grant: Grant, layer: int, slab: torch.Tensor, source: Sequence[int], target: Sequence[int]
    ) -> None:
        """Move blocks `source` of this layer's `slab` (uint8 [slab bytes], the writer's own pool)
        into blocks `target` of the decode pool. A block may be pushed again: the last push wins."""

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Everything pushed or written in place under this grant is complete; `blocks` are the
        target blocks it filled. What the owner needs to see that is on its way when this returns."""

    def abandon(self, grant: Grant) -> None:
        """Nothing more will be written under this grant."""

    def close(self) -> None:
        """Unmap, disconnect. The owner's memory is not touched."""
