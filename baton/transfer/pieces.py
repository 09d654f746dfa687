"""Blocks as rows of a slab, the stretches in which they are copied, the digest over what moved.

The digest is bound to the grant: sha256 over transport, worker, epoch, run, generation and blocks,
then for each piece its label and the CRC-32 of its bytes. CRC-32 finds every flip of up to 32
neighbouring bits and lets one damaged piece in four billion pass. It is there against mistakes (a
late or lost write, a faulty link), at three times the speed of sha256; against malice there are
CURVE and private folders.
"""

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Stretch:
    """`count` blocks that lie side by side in the source and in the target."""

    source: int
    target: int
    count: int


def stretches(source: Sequence[int], target: Sequence[int], longest: int) -> list[Stretch]:
    """The fewest copies that move source[i] to target[i], in order, of `longest` blocks at most."""
    found: list[Stretch] = []
    start = 0
    for i in range(1, len(source) + 1):
        if (
            i < len(source)
            and i - start < longest
            and source[i] == source[i - 1] + 1
            and target[i] == target[i - 1] + 1
        ):
            continue
        found.append(Stretch(source[start], target[start], i - start))
        start = i
    return found


@dataclass(frozen=True, slots=True)
class Rows:
    """One layer's slab seen as rows of blocks."""

    keys: torch.Tensor  # uint8 [blocks, key_block_bytes]
    values: torch.Tensor  # uint8 [blocks, value_block_bytes]

    def copy(self, stretch: Stretch, source: "Rows", *, non_blocking: bool = False) -> None:
        """Take this stretch over from `source`."""
        ours = slice(stretch.target, stretch.target + stretch.count)
        theirs = slice(stretch.source, stretch.source + stretch.count)
        self.keys[ours].copy_(source.keys[theirs], non_blocking=non_blocking)
        self.values[ours].copy_(source.values[theirs], non_blocking=non_blocking)


def rows(layout: KVLayout, layer: int, slab: torch.Tensor) -> Rows:
    """The rows of this layer's slab, views of it. It may have any number of blocks."""
    key_bytes, value_bytes = layout.key_block_bytes(layer), layout.value_block_bytes(layer)
    blocks, rest = divmod(slab.numel(), key_bytes + value_bytes)
    if rest or slab.dtype != torch.uint8 or slab.dim() != 1:
        raise TransferError(f"this is no slab of layer {layer}: {slab.dtype} {tuple(slab.shape)}")
    keys, values = slab[: blocks * key_bytes], slab[blocks * key_bytes :]
    return Rows(keys.view(blocks, key_bytes), values.view(blocks, value_bytes))


class Digest:
    """Runs along with the pieces of one fill."""

    def __init__(self, grant: Grant, transport: str) -> None:
        names = [
            transport,
            grant.worker,
            grant.epoch,
            grant.run,
            grant.generation,
            list(grant.blocks),
        ]
        self._hash = hashlib.sha256(msgpack.packb(names))

    def add(self, label: bytes, *parts: torch.Tensor | memoryview | bytes) -> None:
        """One piece: what it is, and its bytes (in one part or more, contiguous, on the CPU)."""
        crc = 0
        for part in parts:
            data = part.numpy().data if isinstance(part, torch.Tensor) else part
            crc = zlib.crc32(data, crc)
        self._hash.update(struct.pack("<II", len(label), crc) + label)

    @property
    def value(self) -> bytes:
        """Of all pieces so far."""
        return self._hash.digest()[:16]


def digest_of_blocks(grant: Grant, transport: str, blocks: Sequence[int]) -> bytes:
    """Where nothing moves: these blocks were filled under this grant."""
    digest = Digest(grant, transport)
    digest.add(struct.pack(f"<{len(blocks)}I", *blocks))
    return digest.value


def check_push(
    grant: Grant, layout: KVLayout, layer: int, source: Sequence[int], target: Sequence[int]
) -> None:
    """The caller's mistakes, before a byte moves."""
    if not 0 <= layer < len(layout.layers):
        raise TransferError(f"layer {layer} of a KV pool with {len(layout.layers)} layers")
    if len(source) != len(target):
        raise TransferError(f"{len(source)} source blocks for {len(target)} target blocks")
    check_blocks(grant, target)


def check_in_place(
    pool: torch.Tensor, slab: torch.Tensor, source: Sequence[int], target: Sequence[int]
) -> None:
    """Where the pool is shared, to push anything but what lies in it already is a mistake."""
    if slab.data_ptr() != pool.data_ptr() or list(source) != list(target):
        raise TransferError("the pool is shared: compute into link.slabs, there is no push")


def in_order(grant: Grant, blocks: Sequence[int]) -> list[int]:
    """These blocks in the order of their grant, each once. Refuses others."""
    check_blocks(grant, blocks)
    chosen = set(blocks)
    return [block for block in grant.blocks if block in chosen]


def check_blocks(grant: Grant, blocks: Sequence[int]) -> None:
    """Nobody writes outside the grant."""
    outside = set(blocks).difference(grant.blocks)
    if outside:
        raise TransferError(f"{grant.run}: blocks {sorted(outside)[:4]} are not in its grant")


def gather(view: Rows, blocks: Sequence[int]) -> torch.Tensor:
    """A copy of these blocks on the CPU: their keys, then their values, uint8 [bytes]."""
    check_source(view, blocks)
    index = torch.tensor(blocks, dtype=torch.int64, device=view.keys.device)
    if view.keys.is_cuda:
        parts = [view.keys.index_select(0, index), view.values.index_select(0, index)]
        return torch.cat([part.view(-1) for part in parts]).cpu()
    keys, values = view.keys[0].numel() * len(blocks), view.values[0].numel() * len(blocks)
    copy = torch.empty(keys + values, dtype=torch.uint8)
    torch.index_select(view.keys, 0, index, out=copy[:keys].view(len(blocks), -1))
    torch.index_select(view.values, 0, index, out=copy[keys:].view(len(blocks), -1))
    return copy


def scatter(payload: memoryview, view: Rows, blocks: Sequence[int]) -> None:
    """Put what gather() made into these blocks."""
    data = torch.frombuffer(payload, dtype=torch.uint8).to(view.keys.device)
    keys = view.keys[0].numel() * len(blocks)
    source = Rows(data[:keys].view(len(blocks), -1), data[keys:].view(len(blocks), -1))
    for stretch in stretches(range(len(blocks)), blocks, len(blocks)):
        view.copy(stretch, source)


def check_source(view: Rows, blocks: Sequence[int]) -> None:
    """Nothing is read from outside the slab."""
    if blocks and not 0 <= min(blocks) <= max(blocks) < len(view.keys):
        raise TransferError(f"source blocks {list(blocks)[:4]} of a pool of {len(view.keys)}")
