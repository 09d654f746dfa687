"""The CUDA calls that transports need. On the CPU each is a plain copy or does nothing, so the code
around them is the same everywhere and is tested without a GPU."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence

import torch

from baton.errors import TransferError
from baton.transfer.pieces import Rows, Stretch, stretches
from sampler.copies import up

HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable
PROBE_BYTES = 8 << 20
FEW_PARTS = 4  # stretches that are copied one by one

logger = logging.getLogger(__name__)


class CopyStream:
    """Copies block rows on a separate stream, so that they overlap with the model's computation."""

    def __init__(self, device: torch.device, deadline_s: float) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._deadline_s = deadline_s

    def after_computing(self) -> None:
        """Order the copies that follow behind all work queued on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, target: Rows, stretch: Stretch, source: Rows) -> None:
        """Queue the copy of one stretch."""
        if self._stream is None:
            target.copy(stretch, source)
            return
        with torch.cuda.stream(self._stream):
            target.copy(stretch, source, non_blocking=True)

    def copy_blocks(
        self, target: Rows, source: Rows, to: Sequence[int], blocks: Sequence[int]
    ) -> None:
        """Queue copies of the blocks of source to blocks `to` of target. Scattered ones between GPUs go
        through a buffer on each, three kernels instead of two small copies for each stretch."""
        parts = stretches(blocks, to, len(blocks))
        if self._stream is None or len(parts) <= FEW_PARTS or not target.keys.is_cuda:
            for part in parts:
                self.copy(target, part, source)
            return
        with torch.cuda.stream(self._stream):
            gathered_copy(target, source, to, blocks)
        there = torch.cuda.Event()  # the last kernel runs on the other GPU's stream
        there.record(torch.cuda.current_stream(target.keys.device))
        self._stream.wait_event(there)

    def pending(self) -> Iterator[int]:
        """Yields 0 while queued copies are running. TransferError after the deadline."""
        if self._stream is None:
            return
        event = torch.cuda.Event()
        event.record(self._stream)
        deadline = time.monotonic() + self._deadline_s
        while not event.query():
            if time.monotonic() > deadline:
                raise TransferError(
                    f"a copy on {self._stream.device} took over {self._deadline_s:g} s"
                )
            yield 0

    def speed(self, source: torch.Tensor, target: torch.Tensor) -> float:
        """GB/s, measured on one copy. Both tensors are uint8 [bytes], of an even length."""
        theirs, ours = (Rows(t.view(2, -1)[:1], t.view(2, -1)[1:]) for t in (source, target))
        self.after_computing()
        self.wait()
        started = time.perf_counter()
        self.copy(ours, Stretch(0, 0, 1), theirs)
        self.wait()
        return source.numel() / (time.perf_counter() - started) / 1e9

    def wait(self) -> None:
        """Block until all queued copies are done. TransferError after the deadline."""
        for _ in self.pending():
            time.sleep(20e-6)


class RegisteredPages:
    """Host memory registered with CUDA for asynchronous copies. Does nothing for a CPU device.

    Registration is lazy: it allocates all pages and takes seconds for many GiB. Call release()
    before the memory is freed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._tensors = tuple(tensors) if device.type == "cuda" else ()
        self._device = device
        self._registered: list[int] = []

    def register(self) -> None:
        """Register the pages once. TransferError if CUDA refuses."""
        if self._registered:
            return
        for tensor in self._tensors:
            with torch.cuda.device(self._device):
                code = torch.cuda.cudart().cudaHostRegister(
                    tensor.data_ptr(), tensor.numel(), HOST_REGISTER_PORTABLE
                )
            if int(code) != 0:
                self.release()
                forget_error(self._device)
                size = tensor.numel() >> 20
                raise TransferError(f"CUDA cannot register {size} MiB of memory: error {int(code)}")
            self._registered.append(tensor.data_ptr())

    def register_or_warn(self) -> None:
        """Register, or log that copies will be slower: they are correct without registration."""
        try:
            self.register()
        except TransferError as error:
            logger.warning("host pages are not pinned, so copies are slower: %s", error)

    def release(self) -> None:
        """Unregister the pages."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered = []


def gathered_copy(target: Rows, source: Rows, to: Sequence[int], blocks: Sequence[int]) -> None:
    """Copy source's `blocks` to target's blocks `to`, side by side in between."""
    index = up(torch.tensor(blocks), source.keys.device)
    places = up(torch.tensor(to), target.keys.device)
    for ours, theirs in ((target.keys, source.keys), (target.values, source.values)):
        together = theirs.index_select(0, index).to(ours.device, non_blocking=True)
        ours.index_copy_(0, places, together)


def forget_error(device: torch.device) -> None:
    """Clear the error that a CUDA call has returned. CUDA keeps it, and the next kernel's launch would
    report it as its own: torch has no call for this, so a launch of ours takes it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def available_memory() -> int:
    """Bytes of available host memory."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
