"""CRCs of single KV blocks: what writer and owner compare where no piece of a stream is hashed."""

import struct
from collections.abc import Sequence

from baton.kv.layout import KVLayout
from baton.transfer.crc import crc32


def block_crc(slab: memoryview, layout: KVLayout, layer: int, blocks: int, block: int) -> int:
    """The CRC of one block's keys, then values. `slab`: uint8 [slab bytes], of so many blocks."""
    keys, values = layout.key_block_bytes(layer), layout.value_block_bytes(layer)
    key, value = block * keys, blocks * keys + block * values
    return crc32(slab[value : value + values], crc32(slab[key : key + keys], 0))


def pack_crcs(layer: int, crcs: Sequence[int]) -> bytes:
    """A layer's part of the digest: the CRCs of its blocks, in the order of the grant."""
    return struct.pack(f"<{1 + len(crcs)}I", layer, *crcs)
