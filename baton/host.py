"""This host, and this process on it: who shares memory with whom, and who dies with whom."""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def host_id() -> str:
    """Equal where processes can find each other under /proc: same boot, same process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc (macOS): the name of the machine must do
        return f"{os.uname().nodename}/{os.uname().version}"


def die_with(parent: int) -> bool:
    """Let the kernel end this process when its parent ends, however that happens. False if the
    parent is gone already. Elsewhere than on Linux the loop looks for the parent once a second."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def core_numbers() -> tuple[int, ...]:
    """Numbers of the cores this process may run on; empty where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return tuple(sorted(os.sched_getaffinity(0)))


def run_on(cores: tuple[int, ...]) -> None:
    """Put every thread of this process on these cores. One that ends meanwhile is no matter."""
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cores)
        except ProcessLookupError:
            continue


def process_age_s() -> float:
    """Seconds since this process was started, its imports included; 0 where nobody knows."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime - started / os.sysconf("SC_CLK_TCK")


def process_runs(pid: int) -> bool:
    """Is there a process of this number (a zombie counts)?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
