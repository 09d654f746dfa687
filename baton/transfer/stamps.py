"""How an owner decides that a grant is filled: stamps on blocks, a digest over the bytes, and the
set of grants it expects.

The digest is bound to the grant: sha256 over transport, worker, epoch, run, generation and blocks,
then for each piece its label and the CRC-32 of its bytes. CRC-32 detects every error burst of up to
32 bits and misses one damaged piece in four billion, at three times the speed of sha256. It guards
against mistakes (late or lost writes, faulty links). CURVE and private folders guard against malice.
"""

import contextlib
import hashlib
import struct
from collections.abc import Collection, Sequence

import msgpack
import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.transfer.crc import crc32


class Digest:
    """A running digest over the pieces of one fill."""

    def __init__(self, grant: Grant, transport: str) -> None:
        about = [transport, grant.worker, grant.epoch, grant.run, grant.generation]
        self._hash = hashlib.sha256(msgpack.packb([*about, list(grant.blocks)]))

    def add(self, label: bytes, *parts: torch.Tensor | memoryview | bytes) -> None:
        """One piece: its label, and its bytes in any number of parts, contiguous and on the CPU."""
        crc = 0
        for part in parts:
            data = part.numpy().data if isinstance(part, torch.Tensor) else part
            crc = crc32(data, crc)
        self.add_crc(label, crc)

    def add_crc(self, label: bytes, crc: int) -> None:
        """One piece of which the CRC-32 is known."""
        self._hash.update(struct.pack("<II", len(label), crc) + label)

    @property
    def value(self) -> bytes:
        """16 bytes, over all pieces so far."""
        return self._hash.digest()[:16]


def joined(digests: Sequence[bytes]) -> bytes:
    """The digest of a fill that was sent by several lanes, from theirs in order: 16 bytes."""
    return hashlib.sha256(b"".join(digests)).digest()[:16]


def pack_blocks(blocks: Sequence[int]) -> bytes:
    """Block numbers as little-endian uint32."""
    return struct.pack(f"<{len(blocks)}I", *blocks)


def digest_of_blocks(grant: Grant, transport: str, blocks: Sequence[int]) -> bytes:
    """The digest of a fill whose bytes are not hashed: it covers the block numbers alone."""
    digest = Digest(grant, transport)
    digest.add(pack_blocks(blocks))
    return digest.value


class Stamps:
    """The last slab of a pool: the generation under which each block was filled completely.

    On CUDA all work runs on a stream of its own and is complete when the call returns, so reading
    stamps does not wait for the model's queue. On the CPU it uses numpy: right after a forward a
    torch operation takes 0.1 ms and more, because its code has been evicted from the caches, and
    the time to first token includes both ends of a transfer.
    """

    def __init__(self, slab: torch.Tensor) -> None:
        self._stamps = slab.view(torch.int64)  # [blocks]
        self._stream = torch.cuda.Stream(slab.device) if slab.is_cuda else None
        self._near = None if slab.is_cuda else self._stamps.numpy()  # the same memory
        self._cleared = 0  # the generation of the last grant whose blocks were marked as not filled

    def write(self, blocks: Sequence[int], generation: int) -> None:
        """Mark these blocks as filled under `generation`; 0 marks them as not filled."""
        if self._near is not None:
            self._near[list(blocks)] = generation
            return
        with self._aside():
            index = torch.tensor(blocks, dtype=torch.int64, device=self._stamps.device)
            self._stamps.index_fill_(0, index, generation)
        if self._stream is not None:
            self._stream.synchronize()

    def clear(self, grant: Grant) -> None:
        """Mark the blocks of a new grant as not filled: once, however many exports of the pool announce
        it, because each time would wait for the GPU."""
        if grant.generation != self._cleared or self._near is not None:
            self.write(grant.blocks, 0)
            self._cleared = grant.generation

    def filled(self, grant: Grant) -> list[int]:
        """The grant's blocks that carry its generation, in the grant's order."""
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
    """Whether a required block is not filled. `needed` None: all blocks of the grant are required."""
    return not set(grant.blocks if needed is None else needed) <= set(filled)


class Expected:
    """The grants of one epoch that may be written now."""

    def __init__(self, epoch: str, blocks: int) -> None:
        self.epoch = epoch
        self._blocks = blocks
        self._grants: dict[int, Grant] = {}

    def add(self, grant: Grant) -> None:
        """TransferError for a grant that this pool's block table cannot have issued."""
        if grant.epoch != self.epoch:
            raise TransferError(
                f"{grant.run}: granted in epoch {grant.epoch}, the pool is exported in {self.epoch}"
            )
        if grant.blocks and not 0 <= min(grant.blocks) <= max(grant.blocks) < self._blocks:
            raise TransferError(f"{grant.run}: grants blocks outside a pool of {self._blocks}")
        if self._grants.setdefault(grant.generation, grant) != grant:
            raise TransferError(f"{grant.run}: generation {grant.generation} was already granted")

    def __contains__(self, grant: Grant) -> bool:
        return self._grants.get(grant.generation) == grant

    def drop(self, grant: Grant) -> None:
        """Forget this grant; an unknown one is ignored."""
        if grant in self:
            del self._grants[grant.generation]
