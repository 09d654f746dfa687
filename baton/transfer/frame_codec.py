"""Messages on a frames socket: a msgpack header, followed by a payload for KV bytes and probes.

    Piece   keys, then values, of some blocks of one layer; sequence counts 0, 1, 2, ... in a lane
    End     everything was sent by this lane: its bytes and digest, the number of lanes, the filled blocks
    Probe   meaningless bytes that measure the bandwidth; the owner answers the last one
    BROKEN  from the owner: what it received is not what was sealed
    Ack     from the owner: it has read so many messages of this connection

A grant is filled by one or more lanes, each a connection of its own. All pieces of a layer take the same
lane, so they arrive in order. A header is a flat array of scalars. decode() returns None for anything
else and never raises.
"""

import struct
from dataclasses import dataclass

import msgpack

from baton.kv.layout import KVLayout
from baton.transfer.pieces import block_bytes
from baton.transfer.sealing import SEAL_BYTES
from baton.transfer.stamps import pack_blocks

VERSION = 3
MAX_LANES = 16
FRAME_BYTES = 1 << 20
FRAME_BLOCKS = 4096
MOST_RUNS = 16  # of a frame; a run has two seals
HEADER_BYTES = FRAME_BYTES  # enough for an End with 262,000 blocks
PROBED = b"probed"
BROKEN = b"broken"


@dataclass(frozen=True, slots=True)
class Piece:
    """The header of a payload."""

    epoch: str
    generation: int
    lane: int
    sequence: int
    layer: int
    blocks: tuple[int, ...]
    seal: int = 0  # the number of the payload's first seal
    runs: tuple[
        int, ...
    ] = ()  # so many blocks, keys then values, are sealed together; none: nothing is

    def encode(self) -> bytes:
        """The header in msgpack."""
        fields = [self.epoch, self.generation, self.lane, self.sequence, self.layer]
        packed = [pack_blocks(self.blocks), self.seal, pack_blocks(self.runs)]
        return msgpack.packb([VERSION, "kv", *fields, *packed])


@dataclass(frozen=True, slots=True)
class End:
    """The last message of a lane."""

    epoch: str
    generation: int
    lane: int
    lanes: int  # of this grant
    sequence: int
    total: int
    digest: bytes
    blocks: tuple[int, ...]

    def encode(self) -> bytes:
        """The header in msgpack."""
        way = [self.epoch, self.generation, self.lane, self.lanes, self.sequence]
        fields = [*way, self.total, self.digest, pack_blocks(self.blocks)]
        return msgpack.packb([VERSION, "end", *fields])


@dataclass(frozen=True, slots=True)
class Probe:
    """The header of a bandwidth measurement."""

    last: bool

    def encode(self) -> bytes:
        """The header in msgpack."""
        return msgpack.packb([VERSION, "probe", self.last])


@dataclass(frozen=True, slots=True)
class Ack:
    """From the owner: so many messages of this connection were read, junk included."""

    messages: int

    def encode(self) -> bytes:
        """The header in msgpack."""
        return msgpack.packb([VERSION, "ack", self.messages])


def decode(header: bytes) -> Piece | End | Probe | Ack | None:
    """The message behind a header; None unless it is well-formed and of this version."""
    if len(header) > HEADER_BYTES:
        return None
    limits = {"max_array_len": 12, "max_map_len": 0, "max_ext_len": 0, "max_str_len": 256}
    try:
        fields = msgpack.unpackb(header, max_bin_len=HEADER_BYTES, **limits)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    match fields:
        case [3, "kv", str(epoch), *numbers, bytes(packed), seal, bytes(sealed)] if len(
            numbers
        ) == 4 and _naturals(*numbers, seal):
            generation, lane, sequence, layer = numbers
            blocks, runs = _unpack_blocks(packed), _unpack_blocks(sealed)
            if not blocks or runs is None or lane >= MAX_LANES:
                return None
            if not runs or (0 not in runs and sum(runs) == len(blocks)):
                return Piece(epoch, generation, lane, sequence, layer, blocks, seal, runs)
        case [3, "end", str(epoch), generation, lane, lanes, *rest] if len(rest) == 4:
            sequence, total, digest, packed = rest
            if not (isinstance(digest, bytes) and isinstance(packed, bytes)):
                return None
            blocks = _unpack_blocks(packed)
            fits = _naturals(generation, lane, lanes, sequence, total) and lane < lanes <= MAX_LANES
            if blocks is not None and fits:
                return End(epoch, generation, lane, lanes, sequence, total, digest, blocks)
        case [3, "probe", bool(last)]:
            return Probe(last)
        case [3, "ack", messages] if _naturals(messages):
            return Ack(messages)
    return None


def blocks_per_frame(layout: KVLayout, layer: int) -> int:
    """How many blocks fit into a frame; at least one, even if it is larger than a frame."""
    return max(1, min(FRAME_BLOCKS, FRAME_BYTES // block_bytes(layout, layer)))


def largest_frame(layout: KVLayout) -> int:
    """The socket's message limit in bytes. ZeroMQ compares it with the bytes on the wire, so it
    includes the seals."""
    blocks = (block_bytes(layout, layer) for layer in range(len(layout.layers)))
    return max(FRAME_BYTES, *blocks) + 2 * MOST_RUNS * SEAL_BYTES


def _naturals(*values: object) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _unpack_blocks(packed: bytes) -> tuple[int, ...] | None:
    return struct.unpack(f"<{len(packed) // 4}I", packed) if len(packed) % 4 == 0 else None
