"""Topology: which worker runs on which device. No torch: the driver's library counts the GPUs."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import InputError


@dataclass(frozen=True, slots=True)
class Topology:
    """The device of each worker process. Colocated: no prefill workers, decode fills its own blocks."""

    prefill_devices: tuple[str, ...]
    decode_devices: tuple[str, ...]
    colocated: bool = False

    def __post_init__(self) -> None:
        if not self.decode_devices:
            raise InputError("there must be at least one decode worker")
        if not self.colocated and not self.prefill_devices:
            raise InputError("there must be at least one prefill worker, or use --colocated")

    def __str__(self) -> str:
        decodes = f"{len(self.decode_devices)} decode on {_names(self.decode_devices)}"
        if self.colocated:
            return f"colocated, {decodes}"
        return f"{len(self.prefill_devices)} prefill on {_names(self.prefill_devices)}, {decodes}"


def plan_topology(
    prefill_devices: Sequence[str] = (),
    decode_devices: Sequence[str] = (),
    *,
    prefills: int = 1,
    decodes: int = 1,
    colocated: bool = False,
    gpus: int = 0,
    ranks: int = 1,
    prefill_ranks: int | None = None,
) -> Topology:
    """Named devices are kept; the other workers are spread. With several GPUs prefill gets the first and
    decode the next ones, a single GPU is shared, without GPUs all run on the CPU. A worker of several
    ranks takes as many GPUs, from its device on: `ranks`, or `prefill_ranks` to prefill."""
    prefills = 0 if colocated else prefills
    if decodes < 1 and not decode_devices:
        raise InputError(f"there must be at least one decode worker, got {decodes}")
    named = [*prefill_devices, *decode_devices]
    unnamed = [prefill_ranks or ranks] * (0 if prefill_devices else prefills)
    unnamed += [ranks] * (0 if decode_devices else decodes)
    if 0 < gpus < (most := max(unnamed, default=0)):
        raise InputError(
            f"--tensor-parallel-size {most} needs {most} GPUs, and there are {gpus}: use fewer ranks, "
            "or --prefill-device cpu --decode-device cpu"
        )
    if sum(unnamed) <= gpus and not named:  # each has its own
        spread = [f"cuda:{sum(unnamed[:i])}" for i in range(len(unnamed))]
    else:
        widest = max(unnamed, default=1)
        firsts = range(0, gpus - widest + 1, widest)
        there = sorted((f"cuda:{i}" for i in firsts), key=named.count) or ["cpu"]
        spread = [there[i % len(there)] for i in range(len(unnamed))]
    chosen_prefill = tuple(prefill_devices) or tuple(spread[:prefills])
    chosen_decode = tuple(decode_devices) or tuple(spread[-decodes:])
    return Topology(() if colocated else chosen_prefill, chosen_decode, colocated)


def gpus_of(device: str, ranks: int) -> frozenset[int]:
    """Numbers of the GPUs that a worker on this device uses; none on a CPU."""
    kind, _, first = device.partition(":")
    return frozenset(range(int(first or 0), int(first or 0) + ranks) if kind == "cuda" else ())


def count_gpus() -> int:
    """Visible NVIDIA GPUs, else AMD GPUs, else 0."""
    for library, prefix, start in (("libcuda.so.1", "cuDeviceGetCount", "cuInit"),
                                   ("libamdhip64.so", "hipGetDeviceCount", None)):  # fmt: skip
        try:
            driver = ctypes.CDLL(library)
            count = ctypes.c_int(0)
            if (start is None or getattr(driver, start)(0) == 0) and (
                getattr(driver, prefix)(ctypes.byref(count)) == 0
            ):
                return count.value
        except (OSError, AttributeError):
            continue
    return 0


def threads_per_worker(topology: Topology) -> int:
    """CPU workers share the cores evenly: two on one core slow each other by far more than half."""
    devices = (*topology.prefill_devices, *topology.decode_devices)
    on_cpu = sum(1 for device in devices if device == "cpu")
    return max(1, usable_cores() // max(1, on_cpu))


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _names(devices: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(devices))
