"""This machine, as far as it can be told without torch: name, cores, memory."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from baton.topology import usable_cores


@dataclass(frozen=True, slots=True)
class Machine:
    """What the work runs on. `memory_bytes` is 0 where the system does not say."""

    cpu: str
    cores: int
    memory_bytes: int

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.1f} GiB memory" if self.memory_bytes else ""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.cpu}, {cores}{memory}"


def this_machine() -> Machine:
    """Read off the system, without torch."""
    return Machine(cpu_name(), usable_cores(), memory_bytes())


def cpu_name() -> str:
    """The CPU's name as it calls itself."""
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith(("model name", "Hardware", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
