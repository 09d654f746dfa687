"""Orders: what the first rank of a worker tells the others, over a socket pair that nobody else has.

    size     bytes, tokens, beside       all say how many blocks of a pool fit them
    map      number, blocks, region      a pool of this worker, by the memory that it lies over
    drop     number
    arrived  number, blocks              another worker has filled these blocks
    run, fill, hidden   number, rows, stored       one forward

A forward's rows hold token ids, positions and block tables, and so all that a rank needs to make the same
plan as the first one. `stored`: what the forward wrote is to be in the pool's slabs afterwards.
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import msgpack

from baton.kv.region import Region
from baton.kv.row import Logits, Row

SIZE, MAP, DROP, ARRIVED = "size", "map", "drop", "arrived"
RUN, FILL, HIDDEN = "run", "fill", "hidden"
FORWARDS = (RUN, FILL, HIDDEN)


def pack_order(kind: str, *fields: Any) -> bytes:
    """One order, of plain values."""
    packed: bytes = msgpack.packb([kind, *fields])
    return packed


def unpack_order(data: bytes) -> tuple[str, list[Any]]:
    """Its kind and its fields."""
    kind, *fields = msgpack.unpackb(data)
    return kind, fields


def plain_rows(rows: Sequence[Row], block_size: int) -> list[list[Any]]:
    """Rows as plain values, with no more of a block table than a forward reads."""
    return [
        [
            list(row.token_ids),
            row.start,
            list(row.blocks[: -(-row.end // block_size)]),
            row.logits.value,
            row.rope_floor,
        ]
        for row in rows
    ]


def rows_of(plain: Sequence[Sequence[Any]]) -> list[Row]:
    """The same rows again."""
    return [
        Row(ids, start, blocks, Logits(logits), rope) for ids, start, blocks, logits, rope in plain
    ]


def plain_region(region: Region) -> list[Any]:
    """A region as plain values."""
    return list(astuple(region))


def region_of(plain: Sequence[Any]) -> Region:
    """The same region again."""
    return Region(*plain)
