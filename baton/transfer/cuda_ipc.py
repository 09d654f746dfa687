"""CUDA IPC: the writer maps the owner's pool on the GPU. On the same GPU it computes into the pool;
from another GPU with peer access it copies each layer as soon as it is computed.

The pool is exported once in its lifetime, never per request. The GPU is named by its UUID, because
two processes may number the same GPU differently. What PyTorch does underneath
(torch/csrc/StorageSharing.cpp, CudaIPCTypes.cpp; the same in 2.11 and 2.13), and the consequences:

* `_share_cuda_()` gives the storage a reference counter of 1, in a file /dev/shm/torch_<pid>_... .
  Each process that opens it subtracts 1 on close, and a freed storage whose counter is above 0 is
  kept. A pool that no process opened would therefore never be freed, so Slabs.close() subtracts
  the first 1 itself. A counter below 0 is harmless and counters are not reused, so any number of
  writers may open one export.
* That file (80 KB) stays behind if the owner is killed. After the death of a decode worker,
  /dev/shm/torch_<its pid>_* may be deleted.
* `_new_shared_cuda()` can wait for an event of the exporter. We export when the GPU is idle instead
  and pass no event, so a link can be closed and opened again at any time.
* Another process has to open the handle: CUDA refuses to open it in the process that made it.
* If the exporter dies, its importers lose what they mapped and must be restarted. For an orderly
  shutdown close the links first, then the pool.

The stamps are on the GPU too. The writer stamps when its stream has finished all computation and
copies, and waits for that before it sends the receipt. Bytes moved by peer copies are not hashed.
"""

import os
import time
from collections.abc import Sequence

import torch

from baton.bounds import Plain
from baton.errors import TransferError
from baton.host import host_id
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Receipt, Region
from baton.transfer.base import Owner, Writer
from baton.transfer.checks import (
    Address,
    check_grant,
    check_in_place,
    check_push,
    check_source,
    in_order,
)
from baton.transfer.device import PROBE_BYTES, CopyStream
from baton.transfer.in_place import InPlaceExport
from baton.transfer.pieces import block_bytes, rows
from baton.transfer.slabs import CudaHandle, Slabs, refuse_expandable
from baton.transfer.stamps import Stamps, digest_of_blocks

CUDA_IPC_HANDLE_BYTES = 64


class CudaIpcLink:
    """The owner's pool, mapped on its GPU. `slabs` is None if the writer computes on another GPU."""

    transport = "cuda_ipc"

    def __init__(self, region: Region, layout: KVLayout, writer: Writer) -> None:
        self.why = ""
        if writer.device.type != "cuda":
            raise TransferError(f"the pool is on a GPU, the writer on {writer.device}")
        index = writer.device.index
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._layout = layout
        address = Address(region)
        address.check_layout(layout)
        address.check_host()
        self._epoch = address.field("epoch", str)
        self._pool = _map(address, layout.slab_bytes(region.blocks), self._device)
        self._in_place = self._pool[0].device == self._device
        self.slabs: Sequence[torch.Tensor] | None = self._pool if self._in_place else None
        self._stamps = Stamps(self._pool[-1])
        self._copies = CopyStream(self._device, writer.deadline_s)
        self._pushed: dict[int, tuple[int, float]] = {}  # by generation: bytes and seconds

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """Copies nothing on one GPU. Otherwise the copy is still running when this returns: do not
        change the source blocks until finish(), or until they are pushed again."""
        started = time.perf_counter()
        check_push(grant, self._layout, layer, source, target)
        check_grant(grant, self._epoch, closed=not self._pool)
        if self._in_place:
            check_in_place(self._pool[layer], slab, source, target)
            return
        view, pool = (rows(self._layout, layer, each) for each in (slab, self._pool[layer]))
        check_source(source, len(view.keys))
        self._copies.after_computing()
        self._copies.copy_blocks(pool, view, target, source)
        moved, seconds = self._pushed.get(grant.generation, (0, 0.0))
        moved += len(source) * block_bytes(self._layout, layer)
        self._pushed[grant.generation] = moved, seconds + time.perf_counter() - started

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Wait for the current stream and the copies, then stamp."""
        started = time.perf_counter()
        check_grant(grant, self._epoch, closed=not self._pool)
        ordered = in_order(grant, blocks)
        self._copies.after_computing()
        self._copies.wait()
        self._stamps.write(ordered, grant.generation)
        digest = digest_of_blocks(grant, "cuda_ipc", ordered)
        moved, seconds = self._pushed.pop(grant.generation, (0, 0.0))
        return Receipt(moved, digest, seconds + time.perf_counter() - started, self.transport)

    def abandon(self, grant: Grant) -> None:
        """Wait until nothing queued so far is still writing."""
        if not self._pool:
            return
        self._copies.after_computing()
        self._copies.wait()
        self._pushed.pop(grant.generation, None)

    def probe(self) -> float:
        """Bandwidth in GB/s to the owner's GPU, measured with a copy of 8 MiB; 0 if both share a GPU."""
        if self._in_place:
            return 0.0
        source, target = (
            torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=each)
            for each in (self._device, self._pool[0].device)
        )
        torch.cuda.synchronize(target.device)
        return self._copies.speed(source, target)

    def close(self) -> None:
        """The mapping ends with the last tensor over it, which the engine may still hold."""
        if self._pool:
            self._copies.wait()
        self.slabs, self._pool = None, ()
        self.__dict__.pop("_stamps", None)


def gpu_id(index: int) -> str:
    """The GPU's UUID."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _share(slabs: Slabs) -> list[CudaHandle]:
    if not slabs.exported:
        refuse_expandable(slabs.tensors[0])
        try:
            shares = [each.untyped_storage()._share_cuda_() for each in slabs.tensors]
            torch.cuda.synchronize(slabs.device)  # the stamps are zeroed before the first open
        except RuntimeError as error:
            raise TransferError(f"CUDA cannot export the pool: {first_line(error)}") from error
        slabs.exported = [CudaHandle(*share) for share in shares]
    return slabs.exported


def _map(address: Address, sizes: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    if address.field("pid", int) == os.getpid():
        raise TransferError("CUDA IPC works between processes; this pool belongs to this process")
    known = [gpu_id(i) for i in range(torch.cuda.device_count())]
    if address.field("gpu", str) not in known:
        raise TransferError("the pool's GPU is not visible to this process")
    owner = known.index(address.field("gpu", str))
    if owner != device.index and not torch.cuda.can_device_access_peer(device.index, owner):
        raise TransferError(f"{device} cannot reach the memory of the pool's GPU (cuda:{owner})")
    if address.list_of("sizes", int) != sizes:
        raise TransferError("the exported pool does not have the size of its layout")
    fields = zip(
        address.list_of("handles", bytes),
        sizes,
        address.list_of("offsets", int),
        address.list_of("counters", bytes),
        address.list_of("counter_offsets", int),
        strict=True,
    )
    no_event = (bytes(CUDA_IPC_HANDLE_BYTES), False)
    try:
        storages = [
            torch.UntypedStorage._new_shared_cuda(owner, *each, *no_event) for each in fields
        ]
    except (RuntimeError, ValueError) as error:
        raise TransferError(f"CUDA cannot open the pool: {first_line(error)}") from error
    empty = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", owner))
    return tuple(empty.new_empty(0).set_(storage) for storage in storages)


def first_line(error: Exception) -> str:
    """The first line of a CUDA error, which may have many."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def export(slabs: Slabs, owner: Owner) -> InPlaceExport:
    """See baton/kv/transports.py."""
    if slabs.device.type != "cuda":
        raise TransferError(f"CUDA IPC shares memory of a GPU; this pool is on {slabs.device}")
    handles = _share(slabs)
    address: Plain = {
        "host": host_id(),
        "pid": os.getpid(),
        "epoch": owner.epoch,
        "gpu": gpu_id(slabs.tensors[0].device.index),
        "handles": [each.handle for each in handles],
        "sizes": [each.size for each in handles],
        "offsets": [each.offset for each in handles],
        "counters": [each.counter for each in handles],
        "counter_offsets": [each.counter_offset for each in handles],
    }
    region = Region("cuda_ipc", slabs.layout.fingerprint, slabs.blocks, address)
    return InPlaceExport(slabs, epoch=owner.epoch, region=region)


link = CudaIpcLink
