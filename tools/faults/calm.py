"""Calm: did the machine belong to the battery? Times are pass lines only where it did.

What others took of the cores is what the machine was busy with, without what this process and its ended
children used. Time that a hypervisor took counts as theirs. Niced processes do not count: they only get
cores that nobody else wants.
"""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MOST_FOREIGN = 0.25
"""Cores that others may use on average while a row runs, before its time bars become notes."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Moment:
    """What was used up to a moment, in seconds."""

    at: float
    machine_s: float  # of all cores, by everybody
    own_s: float  # by this process and its children that have ended

    @classmethod
    def now(cls) -> Self:
        whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        used = [resource.getrusage(each) for each in whose]
        own = sum(each.ru_utime + each.ru_stime for each in used)
        return cls(time.monotonic(), busy_s(Path("/proc/stat").read_text()), own)


def busy_s(stat: str) -> float:
    """CPU seconds of the whole machine, from the text of /proc/stat: user, system, interrupts and stolen
    time, without niced, idle and waiting."""
    user, _, system, _, _, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + system + irq + softirq + steal) / TICKS


def why_not_calm(begin: Moment, end: Moment, *, lenient: bool) -> str:
    """Why time bars of what ran between these moments are notes; empty: they are pass lines."""
    if lenient:
        return "--lenient-times"
    took = max(end.at - begin.at, 1e-3)
    foreign = (end.machine_s - begin.machine_s - (end.own_s - begin.own_s)) / took
    if foreign <= MOST_FOREIGN:
        return ""
    return f"others used {foreign:.2f} cores meanwhile, more than {MOST_FOREIGN:g}"
