"""Stamps and grants: what an owner knows of its blocks, the same for every transport."""

import contextlib
from collections.abc import Collection, Sequence

import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Receipt
from baton.transfer.pieces import digest_of_blocks


class Stamps:
    """The last slab of a pool: under which generation each block was completely filled.

    On CUDA everything here happens on a stream of its own and is done when the call returns, so
    that a look at the stamps does not wait for the model's own queue of work. On a CPU it goes by
    numpy: between two forwards an operation of torch takes 0.1 ms and more, for its code has been
    driven from the caches, and a first token waits for both ends of a hand-over.
    """

    def __init__(self, slab: torch.Tensor) -> None:
        self._stamps = slab.view(torch.int64)  # [blocks]
        self._stream = torch.cuda.Stream(slab.device) if slab.is_cuda else None
        self._near = None if slab.is_cuda else self._stamps.numpy()  # the same memory

    def write(self, blocks: Sequence[int], generation: int) -> None:
        """These blocks are filled; 0: they are not."""
        if self._near is not None:
            self._near[list(blocks)] = generation
            return
        with self._aside():
            index = torch.tensor(blocks, dtype=torch.int64, device=self._stamps.device)
            self._stamps.index_fill_(0, index, generation)
        if self._stream is not None:
            self._stream.synchronize()

    def filled(self, grant: Grant) -> list[int]:
        """The grant's blocks that are stamped with its generation, in its order."""
        if self._near is not None:
            found = self._near[list(grant.blocks)].tolist()
        else:
            with self._aside():
                index = torch.tensor(grant.blocks, dtype=torch.int64, device=self._stamps.device)
                found = self._stamps.index_select(0, index).tolist()
        return [
            b for b, stamp in zip(grant.blocks, found, strict=True) if stamp == grant.generation
        ]

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()


def lacking(grant: Grant, filled: Collection[int], needed: Sequence[int] | None) -> bool:
    """Is a block that must be filled (all of the grant's if None) not filled?"""
    return not set(grant.blocks if needed is None else needed) <= set(filled)


def judge(
    stamps: Stamps,
    grant: Grant,
    receipt: Receipt,
    *,
    transport: str,
    needed: Sequence[int] | None,
) -> str | None:
    """What is wrong with a fill whose writer stamps by itself, or None."""
    filled = stamps.filled(grant)
    if lacking(grant, filled, needed):
        return "unfilled"
    return None if receipt.digest == digest_of_blocks(grant, transport, filled) else "digest"


class Expected:
    """The grants of one epoch under which writes are welcome."""

    def __init__(self, epoch: str, blocks: int) -> None:
        self.epoch = epoch
        self._blocks = blocks
        self._grants: dict[int, Grant] = {}

    def add(self, grant: Grant) -> None:
        """Refuses what the block table cannot have granted."""
        if grant.epoch != self.epoch:
            raise TransferError(
                f"{grant.run}: granted in epoch {grant.epoch}, the pool is exported in {self.epoch}"
            )
        if grant.blocks and not 0 <= min(grant.blocks) <= max(grant.blocks) < self._blocks:
            raise TransferError(f"{grant.run}: grants blocks outside a pool of {self._blocks}")
        if self._grants.setdefault(grant.generation, grant) != grant:
            raise TransferError(f"{grant.run}: generation {grant.generation} is granted already")

    def __contains__(self, grant: Grant) -> bool:
        return self._grants.get(grant.generation) == grant

    def drop(self, grant: Grant) -> None:
        """It is over."""
        if grant in self:
            del self._grants[grant.generation]
