"""Usage: the CPU time of processes and the utilisation of a GPU during a measurement. It is read from
outside: /proc for the processes, NVML for the GPU if pynvml is installed.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

SAMPLES_PER_S = 10.0
PEAK_SAMPLES = 10  # interval of the peak: CPU time is counted in hundredths of a second


@dataclass(frozen=True, slots=True)
class Sample:
    """CPU seconds of each process so far, and the GPU's utilisation now (None: unknown)."""

    at: float
    cpu_s: Mapping[str, float]
    gpu_percent: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Means over `seconds`. Cores: 1.5 is one and a half busy cores."""

    seconds: float
    cores: Mapping[str, float]  # by process
    peak_cores: float  # of all, in the busiest second
    gpu_percent: float | None
    samples: int

    @property
    def total_cores(self) -> float:
        """Busy cores of all processes."""
        return sum(self.cores.values())


def summarise_usage(samples: list[Sample]) -> Usage:
    """The means. A process missing at either end (it was restarted) counts as idle there."""
    first, last = samples[0], samples[-1]
    lasted = last.at - first.at
    cores = {
        name: max(0.0, last.cpu_s[name] - first.cpu_s.get(name, 0.0)) / lasted if lasted else 0.0
        for name in last.cpu_s
    }
    step = min(PEAK_SAMPLES, len(samples) - 1)
    peaks = [
        sum(max(0.0, after.cpu_s[n] - before.cpu_s.get(n, after.cpu_s[n])) for n in after.cpu_s)
        / (after.at - before.at)
        for before, after in zip(samples, samples[step:], strict=False)
        if after.at > before.at
    ]
    gpu = [each.gpu_percent for each in samples if each.gpu_percent is not None]
    return Usage(
        lasted, cores, max(peaks, default=0.0), sum(gpu) / len(gpu) if gpu else None, len(samples)
    )


def cpu_seconds(stat: str, ticks_per_s: float) -> float:
    """User and system time from /proc/PID/stat. The process name in it may contain any character."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks_per_s


def memory_of(status: str) -> dict[str, int]:
    """Bytes of memory now (VmRSS) and at the peak (VmHWM), from /proc/PID/status."""
    found = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


def own_memory() -> dict[str, int]:
    """As memory_of, for this process; empty without /proc."""
    try:
        return memory_of(Path("/proc/self/status").read_text())
    except OSError:
        return {}


def forget_peak() -> bool:
    """Reset VmHWM. False if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(slots=True)
class Sampler:
    """Samples `rate` times a second, in a thread, while the block runs. Sets `usage` at the end."""

    pids: Mapping[str, int]
    rate: float = SAMPLES_PER_S
    usage: Usage | None = None
    _samples: list[Sample] = field(default_factory=list)
    _over: Event = field(default_factory=Event)
    _thread: Thread | None = None
    _gpu: "Gpu | None" = None

    def __enter__(self) -> "Sampler":
        self._gpu = Gpu.first()
        self._sample()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join()
        self._sample()
        self.usage = summarise_usage(self._samples)

    def _watch(self) -> None:
        while not self._over.wait(1 / self.rate):
            self._sample()

    def _sample(self) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        cpu = {}
        for name, pid in self.pids.items():
            try:
                cpu[name] = cpu_seconds(Path(f"/proc/{pid}/stat").read_text(), ticks)
            except OSError:  # it has ended, or there is no /proc
                continue
        gpu = self._gpu.percent() if self._gpu else None
        self._samples.append(Sample(time.monotonic(), cpu, gpu))


class Gpu:
    """The first GPU, read through NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def first(cls) -> "Gpu | None":
        """None without pynvml or a GPU."""
        if find_spec("pynvml") is None:
            return None
        nvml = import_module("pynvml")
        try:
            nvml.nvmlInit()
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        except nvml.NVMLError:
            return None

    def percent(self) -> float | None:
        """Utilisation over NVML's last sampling period; None if it is not available."""
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except self._nvml.NVMLError:
            return None
