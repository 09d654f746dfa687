"""CUDA IPC: the writer maps the owner's pool on the GPU. On the same GPU it computes into it; from
another GPU that can reach it, it copies each layer over as soon as it is computed.

The pool is exported once in its life, never per request, and the GPU is named by its UUID: two
processes may number the same GPU differently. What PyTorch does underneath
(torch/csrc/StorageSharing.cpp, CudaIPCTypes.cpp; 2.11 and 2.13 agree), and what follows for us:

* `_share_cuda_()` puts the storage behind a counter of 1, in a file /dev/shm/torch_<pid>_... .
  Every opener takes 1 off when it closes; a freed storage whose counter is above 0 stays in limbo.
  So a pool that nobody opened would never be freed: Slabs.close() takes the first 1 off itself.
  Below 0 is harmless and no counter is used twice; so any number of writers may open one export.
* That file is PyTorch's, 80 KB, and stays behind if the owner is killed. Whoever cleans up after a
  dead decode worker may unlink /dev/shm/torch_<its pid>_*.
* `_new_shared_cuda()` can wait for an event of the exporter. We export when the GPU is idle instead
  and say that there is none, so that a link can be closed and opened again at will.
* The opener must be another process: CUDA refuses to open a handle where it was made.
* The exporter takes its importers with it: when it dies, what they mapped is lost, and they must be
  started anew. When it ends in order, close links first, then the pool.

The stamps are on the GPU too. The writer stamps when its stream is done with all that was computed
or copied, and waits for that, before it speaks of it; what peer copies moved is not hashed.
"""

import os
import time
from collections import Counter
from collections.abc import Sequence

import torch
import zmq

from baton.errors import TransferError
from baton.host import host_id
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Arrival, Plain, Receipt, Region
from baton.transfer.address import Address
from baton.transfer.base import Owner, Writer
from baton.transfer.device import CopyStream
from baton.transfer.frame_codec import block_bytes
from baton.transfer.pieces import (
    check_in_place,
    check_push,
    check_source,
    digest_of_blocks,
    in_order,
    rows,
    stretches,
)
from baton.transfer.slabs import CudaHandle, Slabs
from baton.transfer.stamps import Expected, Stamps, judge

PROBE_BYTES = 8 << 20
CUDA_IPC_HANDLE_BYTES = 64


class CudaIpcExport:
    """The pool's own GPU memory, for writers on this host."""

    def __init__(self, slabs: Slabs, *, epoch: str) -> None:
        if slabs.device.type != "cuda":
            raise TransferError(f"CUDA IPC shares memory of a GPU; this pool is on {slabs.device}")
        handles = _share(slabs)
        self.dropped: Counter[str] = Counter()
        self._stamps = Stamps(slabs.tensors[-1])
        self._expected = Expected(epoch, slabs.blocks)
        address: Plain = {
            "host": host_id(),
            "pid": os.getpid(),
            "epoch": epoch,
            "gpu": gpu_id(slabs.tensors[0].device.index),
            "handles": [each.handle for each in handles],
            "sizes": [each.size for each in handles],
            "offsets": [each.offset for each in handles],
            "counters": [each.counter for each in handles],
            "counter_offsets": [each.counter_offset for each in handles],
        }
        self.region = Region("cuda_ipc", slabs.layout.fingerprint, slabs.blocks, address)

    def expect(self, grant: Grant) -> None:
        """See base.py."""
        self._expected.add(grant)
        self._stamps.write(grant.blocks, 0)

    def poll(self) -> bool:
        """The writer's work is done and visible before it speaks of it."""
        return False

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """None."""
        return ()

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """READY or BAD, never PENDING."""
        wrong: str | None = "unknown"
        if grant in self._expected:
            wrong = judge(self._stamps, grant, receipt, transport="cuda_ipc", needed=needed)
        if wrong is None:
            return Arrival.READY
        self.dropped[wrong] += 1
        return Arrival.BAD

    def retire(self, grant: Grant) -> None:
        """See base.py."""
        self._expected.drop(grant)

    def close(self) -> None:
        """The handles stay valid for as long as the pool lives: they are the pool's."""


class CudaIpcLink:
    """The owner's pool, mapped on its GPU. `slabs` is None if we compute on another one."""

    transport = "cuda_ipc"

    def __init__(
        self, region: Region, layout: KVLayout, *, device: torch.device, deadline_s: float = 10.0
    ) -> None:
        self.why = ""
        if device.type != "cuda":
            raise TransferError(f"the pool is on a GPU, the writer on {device}")
        self._device = torch.device("cuda", _index(device))
        self._layout, self._deadline_s = layout, deadline_s
        address = Address(region)
        address.check_layout(layout)
        address.check_host()
        self._epoch = address.text("epoch")
        self._pool = _map(address, layout.slab_bytes(region.blocks), self._device)
        self._in_place = self._pool[0].device == self._device
        self.slabs: Sequence[torch.Tensor] | None = self._pool if self._in_place else None
        self._stamps = Stamps(self._pool[-1])
        self._copies = CopyStream(self._device, deadline_s)
        self._moved: dict[int, int] = {}
        self._seconds: dict[int, float] = {}

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """On one GPU nothing. Else the copy is under way when this returns: the blocks must keep
        what they hold until finish (or until they are pushed again)."""
        started = time.perf_counter()
        check_push(grant, self._layout, layer, source, target)
        self._check(grant)
        if self._in_place:
            check_in_place(self._pool[layer], slab, source, target)
            return
        view, pool = (rows(self._layout, layer, each) for each in (slab, self._pool[layer]))
        check_source(view, source)
        self._copies.after_computing()
        for stretch in stretches(source, target, len(source)):
            self._copies.copy(pool, stretch, view)
        generation, moved = grant.generation, len(source) * block_bytes(self._layout, layer)
        self._moved[generation] = self._moved.get(generation, 0) + moved
        spent = time.perf_counter() - started
        self._seconds[generation] = self._seconds.get(generation, 0.0) + spent

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """Wait until the current stream and our copies are done, then stamp."""
        started = time.perf_counter()
        self._check(grant)
        ordered = in_order(grant, blocks)
        self._copies.after_computing()
        self._copies.wait()
        self._stamps.write(ordered, grant.generation)
        digest = digest_of_blocks(grant, "cuda_ipc", ordered)
        moved = self._moved.pop(grant.generation, 0)
        spent = self._seconds.pop(grant.generation, 0.0) + time.perf_counter() - started
        return Receipt(moved, digest, spent, self.transport)

    def abandon(self, grant: Grant) -> None:
        """Once this returns, nothing queued so far is still writing."""
        if not self._pool:
            return
        self._copies.after_computing()
        self._copies.wait()
        self._moved.pop(grant.generation, None)
        self._seconds.pop(grant.generation, None)

    def probe(self) -> float:
        """8 MiB to the owner's GPU, into memory of our own there."""
        if self._in_place:
            return 0.0
        source, target = (
            torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=each)
            for each in (self._device, self._pool[0].device)
        )
        torch.cuda.synchronize(target.device)
        return self._copies.speed(source, target)

    def close(self) -> None:
        """Unmapped when the last tensor over it dies, which is now unless the engine holds some."""
        if self._pool:
            self._copies.wait()
        self.slabs, self._pool = None, ()
        self.__dict__.pop("_stamps", None)

    def _check(self, grant: Grant) -> None:
        if not self._pool:
            raise TransferError("this link is closed")
        if grant.epoch != self._epoch:
            raise TransferError(f"{grant.run}: granted in another life of {grant.worker}")


def gpu_id(index: int) -> str:
    """The GPU's UUID."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _share(slabs: Slabs) -> list[CudaHandle]:
    if not slabs.exported:
        try:
            shares = [each.untyped_storage()._share_cuda_() for each in slabs.tensors]
            torch.cuda.synchronize(slabs.device)  # the stamps are zeroed; see above
        except RuntimeError as error:
            raise TransferError(f"CUDA cannot export the pool: {first_line(error)}") from error
        slabs.exported = [CudaHandle(*share) for share in shares]
    return slabs.exported


def _map(address: Address, sizes: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    if address.number("pid") == os.getpid():
        raise TransferError("CUDA IPC is between processes, and the pool is this process's own")
    known = [gpu_id(i) for i in range(torch.cuda.device_count())]
    if address.text("gpu") not in known:
        raise TransferError("the pool's GPU is not visible to this process")
    owner = known.index(address.text("gpu"))
    if owner != device.index and not torch.cuda.can_device_access_peer(device.index, owner):
        raise TransferError(f"{device} cannot reach the memory of the pool's GPU (cuda:{owner})")
    if address.numbers("sizes") != sizes:
        raise TransferError("the exported pool has another size than its layout says")
    fields = zip(
        address.datas("handles"),
        sizes,
        address.numbers("offsets"),
        address.datas("counters"),
        address.numbers("counter_offsets"),
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
    """CUDA's errors go on for many lines."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def export(slabs: Slabs, owner: Owner) -> CudaIpcExport:
    """See baton/kv/transports.py."""
    return CudaIpcExport(slabs, epoch=owner.epoch)


def link(region: Region, layout: KVLayout, writer: Writer) -> CudaIpcLink:
    """See baton/kv/transports.py."""
    return CudaIpcLink(region, layout, device=writer.device, deadline_s=writer.deadline_s)
