"""Where a KV pool can be reached, and what became of a fill: plain data for messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

Plain = Mapping[str, str | int | float | bytes | bool | list[int] | list[bytes]]


@dataclass(frozen=True, slots=True)
class Region:
    """Where a decode worker's pool can be reached by one transport."""

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
    """The writer's word on one finished fill; `digest` is bound to the grant and the bytes moved."""

    moved_bytes: int
    digest: bytes
    seconds: float  # spent in push and finish, as the writer saw it
    transport: str = ""  # which way the bytes took
