"""Regions, receipts and arrivals: the address of a KV pool and the result of a fill, for messages."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from baton.bounds import Blocks, Bytes, Digest, Name, OptionalName, Plain, Seconds, Size


@dataclass(frozen=True, slots=True)
class Region:
    """The address of a decode worker's pool for one transport."""

    transport: Name
    layout: Name  # KVLayout.fingerprint
    blocks: Blocks
    address: Plain  # what the transport's link() needs: a path, a handle, a socket address


Regions = Annotated[tuple[Region, ...], Size(0, 64)]


class Arrival(StrEnum):
    """The state of a grant's KV at its owner."""

    READY = "ready"
    PENDING = "pending"  # not complete yet; check again after poll()
    BAD = "bad"  # differs from what was sent: fill it again
    LOST = "lost"  # part of what was sent never came: the way is at fault


@dataclass(frozen=True, slots=True)
class Receipt:
    """The writer's report on a finished fill. `digest` covers the grant and the bytes moved."""

    moved_bytes: Bytes
    digest: Digest
    seconds: Seconds  # spent in push and finish, as the writer saw it
    transport: OptionalName = ""
