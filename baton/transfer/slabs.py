"""Slabs: the memory of one KV pool, one tensor per layer and one for the stamps.

Shared CPU memory is one anonymous file (a memfd: it has no name in the file system and disappears
with the last process that maps it, however that ends). Every part starts on a page of its own:

    | header: magic, token, layout, blocks | slab of layer 0 | slab of layer 1 | ... | stamps |

The token is random. A process that opens the file compares it, so it cannot map another file by
mistake. Without memfd (macOS) the file lies in a private folder and is unlinked at close.

Pages are allocated when they are first written. A mapping lives until the last tensor over it is
freed.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.errors import OutOfMemory, TransferError
from baton.kv.layout import KVLayout
from baton.memory import out_of_memory
from baton.transfer.stamps import Stamps

PAGE = 16384  # the largest page size of all supported systems (Apple silicon)
MAGIC = b"baton-kv-pool-1\n"
TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class SharedFile:
    """The file behind shared slabs, and how another process of this user opens it."""

    fd: int
    path: str
    size: int
    token: bytes = field(repr=False)
    named: bool = False  # a file to unlink at close; otherwise a /proc entry of this process

    def close(self) -> None:
        """No process can open it from now on; existing mappings stay valid."""
        os.close(self.fd)
        if self.named:
            Path(self.path).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class CudaHandle:
    """What another process needs to map one slab on a GPU: the results of _share_cuda_(), in order."""

    device: int
    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool


@dataclass(slots=True)
class Slabs:
    """A pool's memory: `tensors` are uint8 [slab bytes], each with its own storage; the last one
    holds the stamps. `exported` belongs to cuda_ipc.py: a pool is exported once in its lifetime."""

    layout: KVLayout
    blocks: int
    device: torch.device
    tensors: tuple[torch.Tensor, ...]
    shared: SharedFile | None = None
    exported: list[CudaHandle] = field(default_factory=list)
    _stamps: Stamps | None = None

    @property
    def stamps(self) -> Stamps:
        """The stamps of this pool, for all its exports."""
        if self._stamps is None:
            self._stamps = Stamps(self.tensors[-1])
        return self._stamps

    def close(self) -> None:
        """Release the memory. It is freed with the last tensor over it."""
        for each in self.exported:  # or the memory is never freed, see cuda_ipc.py
            torch.UntypedStorage._release_ipc_counter_cuda(each.counter, each.counter_offset)
        self.exported = []
        self.tensors, self._stamps = (), None
        if self.shared is not None:
            self.shared.close()
            self.shared = None


def allocate_slabs(
    layout: KVLayout,
    blocks: int,
    device: torch.device | str,
    *,
    shared: bool,
    folder: Path | None = None,
) -> Slabs:
    """Memory for `blocks` blocks, with the stamps zeroed. `shared`: writers on this machine can map
    it; on a system without memfd that needs `folder`, a private one. Raises OutOfMemory,
    TransferError for other devices than cpu and cuda, ValueError for less than one block."""
    device = torch.device(device)
    if blocks < 1:
        raise ValueError(f"a KV pool needs at least one block, got {blocks}")
    if device.type == "cpu" and shared:
        return _allocate_file(layout, blocks, folder)
    if device.type not in ("cpu", "cuda"):
        raise TransferError(f"a KV pool must be on cpu or cuda, got {device}")
    sizes = layout.slab_bytes(blocks)
    try:
        tensors = tuple(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        left = ""
        if device.type == "cuda":
            left = f" and {device} has {torch.cuda.mem_get_info(device)[0] >> 20} MiB left"
        raise OutOfMemory(
            f"a KV pool of {blocks} blocks needs {sum(sizes) >> 20} MiB{left}, which is more than "
            f"{device} can give; take fewer blocks"
        ) from error
    tensors[-1].zero_()
    return Slabs(layout, blocks, device, tensors)


def map_shared(
    path: str, size: int, token: bytes, layout: KVLayout, blocks: int
) -> list[torch.Tensor]:
    """Map another process's pool: uint8 [slab bytes], one per layer, then the stamps. TransferError
    unless it is the announced file, belongs to this user and holds this layout."""
    try:
        found = os.stat(path)  # before open: a stale /proc path may lead anywhere
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise TransferError("the exported pool is gone: its path leads to another file")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransferError(f"the exported pool cannot be opened: {error.strerror}") from error
    try:
        if os.fstat(fd).st_size != size or size != _file_bytes(layout, blocks):
            raise TransferError("the exported pool does not have the announced size")
        memory = mmap.mmap(fd, size)
    except OSError as error:
        raise TransferError(f"the exported pool cannot be mapped: {error.strerror}") from error
    finally:
        os.close(fd)
    if memory[: len(_header(layout, blocks, token))] != _header(layout, blocks, token):
        raise TransferError("the exported pool is not the announced one, or has another layout")
    return _carve(memory, layout, blocks)


def _allocate_file(layout: KVLayout, blocks: int, folder: Path | None) -> Slabs:
    size, token = _file_bytes(layout, blocks), secrets.token_bytes(TOKEN_BYTES)
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)
        path, named = f"/proc/{os.getpid()}/fd/{fd}", False
    else:
        private_folder(folder)
        path, named = str(folder / f"kv-{secrets.token_hex(8)}") if folder else "", True
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    file = SharedFile(fd, path, size, token, named)
    try:
        os.ftruncate(fd, size)
        if not named:  # shrinking the file would kill its readers with SIGBUS
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        memory = mmap.mmap(fd, size)
    except OSError as error:
        file.close()
        raise OutOfMemory(
            f"cannot allocate {size >> 20} MiB of shared memory for a KV pool ({error.strerror}); "
            "take fewer blocks"
        ) from error
    header = _header(layout, blocks, token)
    memory[: len(header)] = header
    tensors = tuple(_carve(memory, layout, blocks))
    return Slabs(layout, blocks, torch.device("cpu"), tensors, file)


def private_folder(folder: Path | None) -> Path:
    """The folder. TransferError unless it belongs to this user and has mode 0700."""
    if folder is None:
        raise TransferError("this transport needs a run folder, got none")
    found = os.stat(folder)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise TransferError("the run folder must belong to this user and have mode 0700")
    return folder


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _file_bytes(layout: KVLayout, blocks: int) -> int:
    return PAGE + sum(_pages(size) for size in layout.slab_bytes(blocks))


def _header(layout: KVLayout, blocks: int, token: bytes) -> bytes:
    return MAGIC + token + layout.fingerprint.encode() + blocks.to_bytes(8, "little")


def _carve(memory: mmap.mmap, layout: KVLayout, blocks: int) -> list[torch.Tensor]:
    """A tensor over each part. Each has its own storage and keeps the mapping alive."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults, where the system allows it
    tensors, offset = [], PAGE
    for size in layout.slab_bytes(blocks):
        tensors.append(torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset))
        offset += _pages(size)
    return tensors


def refuse_expandable(tensor: torch.Tensor) -> None:
    """TransferError if it cannot be exported: CUDA IPC shares whole cudaMalloc allocations, which
    expandable segments are not."""
    address = tensor.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        inside = segment["address"] <= address < segment["address"] + segment["total_size"]
        if inside and segment.get("is_expandable", False):
            raise TransferError(
                "the KV pool cannot be shared by CUDA IPC while PyTorch uses expandable segments; "
                "remove expandable_segments:True from PYTORCH_ALLOC_CONF (PYTORCH_CUDA_ALLOC_CONF)"
            )
