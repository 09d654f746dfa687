"""What travels on a frames socket: a msgpack header, and for KV bytes a payload.

    Piece   keys then values of some blocks of one layer; sequence counts 0, 1, 2, ... in one grant
    End     everything was sent: total bytes, the digest over all of it, the blocks that are filled
    Probe   bytes that mean nothing, to see how fast they go; the last one is answered

A header is a flat array of scalars; decode() makes None of anything else, and never raises.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from baton.kv.layout import KVLayout

VERSION = 1
FRAME_BYTES = 1 << 20
FRAME_BLOCKS = 4096
CURVE_BYTES = 64
HEADER_BYTES = FRAME_BYTES  # room for an End that names 262,000 blocks
PROBED = b"probed"


@dataclass(frozen=True, slots=True)
class Piece:
    """The header of a payload."""

    epoch: str
    generation: int
    sequence: int
    layer: int
    blocks: tuple[int, ...]

    def encode(self) -> bytes:
        """To the wire."""
        packed = pack_blocks(self.blocks)
        fields = [VERSION, "kv", self.epoch, self.generation, self.sequence, self.layer, packed]
        return msgpack.packb(fields)


@dataclass(frozen=True, slots=True)
class End:
    """The last message of a grant."""

    epoch: str
    generation: int
    sequence: int
    total: int
    digest: bytes
    blocks: tuple[int, ...]

    def encode(self) -> bytes:
        """To the wire."""
        packed = pack_blocks(self.blocks)
        head = [VERSION, "end", self.epoch, self.generation, self.sequence]
        return msgpack.packb([*head, self.total, self.digest, packed])


@dataclass(frozen=True, slots=True)
class Probe:
    """A measurement."""

    last: bool

    def encode(self) -> bytes:
        """To the wire."""
        return msgpack.packb([VERSION, "probe", self.last])


def decode(header: bytes) -> Piece | End | Probe | None:
    """From the wire; None for what is not exactly one of ours."""
    if len(header) > HEADER_BYTES:
        return None
    limits = {"max_array_len": 8, "max_map_len": 0, "max_ext_len": 0, "max_str_len": 256}
    try:
        fields = msgpack.unpackb(header, max_bin_len=HEADER_BYTES, **limits)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    match fields:
        case [1, "kv", str(epoch), generation, sequence, layer, bytes(packed)]:
            blocks = _unpack_blocks(packed)
            if blocks and _naturals(generation, sequence, layer):
                return Piece(epoch, generation, sequence, layer, blocks)
        case [1, "end", str(epoch), generation, sequence, total, bytes(digest), bytes(packed)]:
            blocks = _unpack_blocks(packed)
            if blocks is not None and _naturals(generation, sequence, total):
                return End(epoch, generation, sequence, total, digest, blocks)
        case [1, "probe", bool(last)]:
            return Probe(last)
    return None


def blocks_per_frame(layout: KVLayout, layer: int) -> int:
    """As many as fit into a frame; one block that does not is a frame of its own."""
    return max(1, min(FRAME_BLOCKS, FRAME_BYTES // block_bytes(layout, layer)))


def largest_frame(layout: KVLayout) -> int:
    """What a socket must let through: the limit is compared with the bytes on the wire, and CURVE
    adds a command name, a nonce and a box to each frame (RFC 26: 33 bytes and flags)."""
    largest = max(FRAME_BYTES, *(block_bytes(layout, i) for i in range(len(layout.layers))))
    return largest + CURVE_BYTES


def block_bytes(layout: KVLayout, layer: int) -> int:
    """One block of one layer, keys and values."""
    return layout.key_block_bytes(layer) + layout.value_block_bytes(layer)


def _naturals(*values: object) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def pack_blocks(blocks: Sequence[int]) -> bytes:
    """Four bytes each."""
    return struct.pack(f"<{len(blocks)}I", *blocks)


def _unpack_blocks(packed: bytes) -> tuple[int, ...] | None:
    return struct.unpack(f"<{len(packed) // 4}I", packed) if len(packed) % 4 == 0 else None
