"""Shared memory: on one host's CPU the writer maps the owner's pool and computes into it.

The region is a path like /proc/PID/fd/N. Only processes of the same user and process namespace can
open it, and no name in the file system is left behind.
"""

import torch

from baton.bounds import Plain
from baton.errors import TransferError
from baton.host import host_id
from baton.kv.layout import KVLayout
from baton.kv.region import Region
from baton.transfer.base import Owner, Writer
from baton.transfer.checks import Address
from baton.transfer.in_place import InPlaceExport, InPlaceLink
from baton.transfer.slabs import Slabs, map_shared


def shared_region(transport: str, slabs: Slabs, epoch: str) -> Region:
    """How another process finds the file behind these slabs. TransferError if they are private."""
    if slabs.shared is None:
        raise TransferError(f"{transport} needs a pool in shared memory; this one is private")
    file = slabs.shared
    address: Plain = {
        "host": host_id(),
        "path": file.path,
        "size": file.size,
        "token": file.token,
        "epoch": epoch,
    }
    return Region(transport, slabs.layout.fingerprint, slabs.blocks, address)


def open_shared(region: Region, layout: KVLayout) -> list[torch.Tensor]:
    """Map what shared_region() described: uint8 [slab bytes], one per layer, then the stamps."""
    address = Address(region)
    address.check_layout(layout)
    address.check_host()
    return map_shared(
        address.field("path", str),
        address.field("size", int),
        address.field("token", bytes),
        layout,
        region.blocks,
    )


def export(slabs: Slabs, owner: Owner) -> InPlaceExport:
    """See baton/kv/transports.py."""
    region = shared_region("shm", slabs, owner.epoch)
    return InPlaceExport(slabs, epoch=owner.epoch, region=region)


def link(region: Region, layout: KVLayout, writer: Writer) -> InPlaceLink:
    """See baton/kv/transports.py."""
    if writer.device.type != "cpu":
        raise TransferError(f"the pool is on the CPU, the writer on {writer.device}")
    epoch = Address(region).field("epoch", str)
    return InPlaceLink(layout, open_shared(region, layout), epoch=epoch, transport="shm")
