"""Checks on both sides of a transport, before a byte moves: addresses, grants and block numbers."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from baton.errors import TransferError
from baton.host import host_id
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Region

Field = TypeVar("Field", str, int, bytes)


class Address:
    """Typed access to the address of a region, which came in a message from another process."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def field(self, name: str, kind: type[Field]) -> Field:
        """One field; integers are not negative. TransferError if it is missing or of another type."""
        return self._checked(name, kind, self._region.address.get(name))

    def list_of(self, name: str, kind: type[Field]) -> list[Field]:
        """A list whose items obey the same rules."""
        values = self._region.address.get(name)
        if not isinstance(values, list | tuple):
            raise self._malformed(name)
        return [self._checked(name, kind, value) for value in values]

    def check_layout(self, layout: KVLayout) -> None:
        """TransferError if the pool holds the blocks of another model or block size."""
        if self._region.layout != layout.fingerprint:
            raise TransferError(
                f"the pool's KV layout is {self._region.layout}, this worker's {layout.fingerprint}; "
                "start both with the same model, dtype and block size"
            )

    def check_host(self) -> None:
        """TransferError unless both processes are on one host, where memory can be shared."""
        if self.field("host", str) != host_id():
            raise TransferError("the pool is on another host (or in another process namespace)")

    def _checked(self, name: str, kind: type[Field], value: object) -> Field:
        if type(value) is not kind or (kind is int and value < 0):  # type: ignore[operator]
            raise self._malformed(name)
        return value

    def _malformed(self, name: str) -> TransferError:
        return TransferError(f"the {self._region.transport} address has no valid {name!r}")


def check_grant(grant: Grant, epoch: str, *, closed: bool) -> None:
    """TransferError unless the link is open and the grant belongs to the epoch it was opened in."""
    if closed:
        raise TransferError("this link is closed")
    if grant.epoch != epoch:
        raise TransferError(
            f"{grant.run}: granted in epoch {grant.epoch} of {grant.worker}, "
            f"this link was opened in epoch {epoch}"
        )


def check_push(
    grant: Grant, layout: KVLayout, layer: int, source: Sequence[int], target: Sequence[int]
) -> None:
    """TransferError if the arguments of Link.push contradict the grant or the layout."""
    if not 0 <= layer < len(layout.layers):
        raise TransferError(f"layer {layer} of a KV pool with {len(layout.layers)} layers")
    if len(source) != len(target):
        raise TransferError(f"{len(source)} source blocks for {len(target)} target blocks")
    check_blocks(grant, target)


def check_in_place(
    pool: torch.Tensor, slab: torch.Tensor, source: Sequence[int], target: Sequence[int]
) -> None:
    """TransferError unless the pushed blocks already lie in the shared pool."""
    if slab.data_ptr() != pool.data_ptr() or list(source) != list(target):
        raise TransferError("the pool is shared: compute into link.slabs, push copies nothing")


def check_blocks(grant: Grant, blocks: Sequence[int]) -> None:
    """TransferError if a block is not part of the grant."""
    outside = set(blocks).difference(grant.blocks)
    if outside:
        raise TransferError(f"{grant.run}: blocks {sorted(outside)[:4]} are not in its grant")


def check_source(blocks: Sequence[int], available: int) -> None:
    """TransferError if a source block lies outside a slab of `available` blocks."""
    if blocks and not 0 <= min(blocks) <= max(blocks) < available:
        raise TransferError(f"source blocks {list(blocks)[:4]} of a pool of {available}")


def in_order(grant: Grant, blocks: Sequence[int]) -> list[int]:
    """These blocks in the order of their grant, without repeats. TransferError for any others."""
    check_blocks(grant, blocks)
    chosen = set(blocks)
    return [block for block in grant.blocks if block in chosen]
