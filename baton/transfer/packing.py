"""Packing: blocks of a writer's pool as the payload of a frame, sealed or not; and where they belong.

    not sealed    a copy: all keys, then all values
    sealed        for each run of adjacent blocks: its keys, sealed, then its values, sealed

A sealed run needs no other copy: AES reads it in one pool and writes it, encrypted, into the payload. At
the owner it reads the payload and writes into the other pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.kv.layout import KVLayout
from baton.transfer.checks import check_source
from baton.transfer.crc import crc32
from baton.transfer.frame_codec import MOST_RUNS, Piece
from baton.transfer.pieces import Rows, gather, rows, scatter, stretches
from baton.transfer.sealing import SEAL_BYTES, Seal

RUN_BYTES = 32 << 10
"""Shorter runs are copied together: a seal costs as much as copying a few KiB."""


class Payload(Protocol):
    """Blocks that are ready to be sent, as the link that packed them knows them."""

    @property
    def size(self) -> int:
        """Bytes of blocks in it."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """A copy, as gather() makes it: a slab of these blocks alone."""

    payload: torch.Tensor  # uint8 [bytes]

    @property
    def size(self) -> int:
        """Bytes of blocks in it."""
        return self.payload.numel()


@dataclass(frozen=True, slots=True)
class Packed:
    """The payload of one frame."""

    payload: torch.Tensor  # uint8 [bytes]
    crc: int  # of what it holds, not sealed
    size: int  # bytes of blocks in it
    seal: int = 0
    runs: tuple[int, ...] = ()  # see Piece


def block_places(
    slab: memoryview, layout: KVLayout, layer: int, first: int, count: int
) -> list[memoryview]:
    """The keys and the values of `count` adjacent blocks in a slab, uint8 [slab bytes] of any number."""
    keys, values = layout.key_block_bytes(layer), layout.value_block_bytes(layer)
    behind = len(slab) // (keys + values) * keys
    value = behind + first * values
    return [slab[first * keys : (first + count) * keys], slab[value : value + count * values]]


def pack(
    layout: KVLayout,
    layer: int,
    slab: torch.Tensor,
    source: Sequence[int],
    target: Sequence[int],
    seal: Seal | None,
) -> Packed:
    """Blocks `source` of this slab, at most blocks_per_frame(), for blocks `target` of the owner's."""
    view = rows(layout, layer, slab)
    if seal is None:
        payload = gather(view, source)
        return Packed(payload, crc32(payload.numpy().data, 0), payload.numel())
    check_source(source, len(view.keys))
    runs = stretches(source, target, len(source))
    size = len(source) * (layout.key_block_bytes(layer) + layout.value_block_bytes(layer))
    if slab.is_cuda or len(runs) > max(1, min(MOST_RUNS, size // RUN_BYTES)):
        slab = gather(view, source)  # a slab of these blocks alone
        runs = stretches(range(len(source)), range(len(source)), len(source))
    memory, pieces, crc = slab.numpy().data, list[memoryview](), 0
    for run in runs:
        pieces += block_places(memory, layout, layer, run.source, run.count)
    for piece in pieces:
        crc = crc32(piece, crc)
    sealed = torch.empty(size + SEAL_BYTES * len(pieces), dtype=torch.uint8)
    first = seal.close_into(pieces, sealed.numpy().data)
    return Packed(sealed, crc, size, first, tuple(run.count for run in runs))


class Places:
    """Where a sealed payload is opened: in the owner's blocks, or in `room` where a run's blocks are not
    adjacent or not in this memory; then settle() copies them."""

    def __init__(self, layout: KVLayout, piece: Piece, slab: torch.Tensor, room: bytearray) -> None:
        self.pieces: list[memoryview] = []
        self._aside: list[tuple[memoryview, tuple[int, ...]]] = []
        memory = None if slab.is_cuda else slab.numpy().data
        rest, blocks = memoryview(room), piece.blocks
        size = layout.key_block_bytes(piece.layer) + layout.value_block_bytes(piece.layer)
        for count in piece.runs:
            run, blocks = blocks[:count], blocks[count:]
            if memory is not None and run == tuple(range(run[0], run[0] + count)):
                self.pieces += block_places(memory, layout, piece.layer, run[0], count)
                continue
            aside, rest = rest[: count * size], rest[count * size :]
            self._aside.append((aside, run))
            self.pieces += block_places(aside, layout, piece.layer, 0, count)

    @property
    def crc(self) -> int:
        """Of what was opened."""
        crc = 0
        for piece in self.pieces:
            crc = crc32(piece, crc)
        return crc

    def settle(self, view: Rows) -> None:
        """Copy what lies aside to its blocks."""
        for aside, run in self._aside:
            scatter(aside, view, run)
