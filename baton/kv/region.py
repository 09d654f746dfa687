"""Regions, receipts and arrivals: the address of a KV pool and the result of a fill, for messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

Plain = Mapping[str, str | int | float | bytes | bool | list[int] | list[bytes]]


@dataclass(frozen=True, slots=True)
class Region:
    """The address of a decode worker's pool for one transport."""

    transport: str
    layout: str  # KVLayout.fingerprint
    blocks: int
    address: Plain  # what the transport's link() needs: a path, a handle, a socket address


class Arrival(StrEnum):
    """The state of a grant's KV at its owner."""

    READY = "ready"
    PENDING = "pending"  # not complete yet; check again after poll()
    BAD = "bad"  # differs from what was sent: fill it again


@dataclass(frozen=True, slots=True)
class Receipt:
    """The writer's report on a finished fill. `digest` covers the grant and the bytes moved."""

    moved_bytes: int
    digest: bytes
    seconds: float  # spent in push and finish, as the writer saw it
    transport: str = ""
