"""The few CUDA calls the transports need. On the CPU each is a plain copy or nothing at all, so the
code around them is the same everywhere and is tested without a GPU."""

import logging
import os
import time
from collections.abc import Iterator, Sequence

import torch

from baton.errors import TransferError
from baton.transfer.pieces import Rows, Stretch

HOST_REGISTER_PORTABLE = 1

logger = logging.getLogger(__name__)


class CopyStream:
    """Copies of block rows on a stream of their own, so that the model computes meanwhile."""

    def __init__(self, device: torch.device, deadline_s: float) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._deadline_s = deadline_s

    def after_computing(self) -> None:
        """What is copied from now on sees what the current stream has queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, target: Rows, stretch: Stretch, source: Rows) -> None:
        """Queue one stretch."""
        if self._stream is None:
            target.copy(stretch, source)
            return
        with torch.cuda.stream(self._stream):
            target.copy(stretch, source, non_blocking=True)

    def pending(self) -> Iterator[int]:
        """Yields 0 for as long as queued copies are not done; TransferError after the deadline."""
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
        """GB/s of this copy (uint8 [bytes] both), done just now."""
        theirs, ours = (Rows(t.view(2, -1)[:1], t.view(2, -1)[1:]) for t in (source, target))
        self.after_computing()
        self.wait()
        started = time.perf_counter()
        self.copy(ours, Stretch(0, 0, 1), theirs)
        self.wait()
        return source.numel() / (time.perf_counter() - started) / 1e9

    def wait(self) -> None:
        """Until all queued copies are done."""
        for _ in self.pending():
            time.sleep(20e-6)


class RegisteredPages:
    """Host memory that CUDA may copy from and to by itself, where the device is a GPU.

    Registered when first needed: it takes all the pages from the system and seconds for many GiB.
    Release it before the memory is let go.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._tensors = tuple(tensors) if device.type == "cuda" else ()
        self._device = device
        self._registered: list[int] = []

    def register(self) -> None:
        """Once; more calls do nothing."""
        if self._registered:
            return
        for tensor in self._tensors:
            with torch.cuda.device(self._device):
                code = torch.cuda.cudart().cudaHostRegister(
                    tensor.data_ptr(), tensor.numel(), HOST_REGISTER_PORTABLE
                )
            if int(code) != 0:
                self.release()
                size = tensor.numel() >> 20
                raise TransferError(f"CUDA cannot register {size} MiB of memory: error {int(code)}")
            self._registered.append(tensor.data_ptr())

    def register_or_warn(self) -> None:
        """For copies that are right without it, only slower."""
        try:
            self.register()
        except TransferError as error:
            logger.warning("shared pages stay pageable, copies are slower: %s", error)

    def release(self) -> None:
        """Take it back from CUDA."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered = []


def available_memory() -> int:
    """Bytes of host memory that could still be used."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
