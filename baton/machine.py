"""This machine: CPU name, cores and memory, read without torch."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from baton.topology import usable_cores


@dataclass(frozen=True, slots=True)
class Machine:
    """CPU and memory of this machine. `memory_bytes` is 0 where the system does not report it."""

    cpu: str
    cores: int
    memory_bytes: int

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.1f} GiB memory" if self.memory_bytes else ""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.cpu}, {cores}{memory}"


def this_machine() -> Machine:
    """Read from the system, without torch."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 0
    return Machine(_cpu_name(), usable_cores(), memory)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(("model name", "Hardware", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
