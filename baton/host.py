"""This host and this process: identity for shared memory, cores, memory, age, ending with the parent."""

import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def host_id() -> str:
    """Equal for processes that see each other under /proc: same boot, same PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc (macOS)
        return f"{os.uname().nodename}/{os.uname().version}"


def die_with(parent: int) -> bool:
    """Let the kernel end this process when its parent ends. False if the parent is gone already. On
    systems other than Linux the loop checks the parent once a second instead."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def core_numbers() -> tuple[int, ...]:
    """Numbers of the cores this process may run on; empty if unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return tuple(sorted(os.sched_getaffinity(0)))


def run_on(cores: tuple[int, ...]) -> None:
    """Pin every thread of this process to these cores. Threads that end meanwhile are skipped."""
    for task in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(task), cores)
        except ProcessLookupError:
            continue


def process_age_s() -> float:
    """Seconds since this process was started, imports included; 0 if unknown."""
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        started = int(process_stat("self")[19])
    except (OSError, IndexError):
        return 0.0
    return uptime - started / os.sysconf("SC_CLK_TCK")


def process_runs(pid: int) -> bool:
    """Whether a process has this number (a zombie counts)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def family(pid: int) -> list[int]:
    """This process and its descendants, as far as the system tells."""
    found = [pid]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):  # of each of its threads
            found += [int(each) for line in _lines(file) for each in line.split()]
    return found


def sees_children() -> bool:
    """Whether this system tells family() who the children of a process are (CONFIG_PROC_CHILDREN)."""
    return Path(f"/proc/self/task/{os.getpid()}/children").exists()


def any_stopped(pids: Sequence[int]) -> bool:
    """Whether a signal holds up one of them (SIGSTOP); False if unknown."""
    return any(process_stat(pid)[:1] == ["T"] for pid in pids)


def processor_time(pids: Sequence[int]) -> int | None:
    """Ticks that they and their children that have ended have used; None if unknown. For comparison with
    an earlier figure, of which it may fall short: some may be gone."""
    fields = [process_stat(pid)[11:15] for pid in pids]  # utime, stime, and those of ended children
    return sum(int(each) for four in fields for each in four) if any(fields) else None


def process_stat(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat (proc_pid_stat(5)) from the state on; empty if there are none. `pid`: a
    number or "self"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def available_memory() -> int | None:
    """Bytes of main memory that can be allocated now; None if the system does not report it."""
    limits = [meminfo("MemAvailable"), _cgroup_room(), _process_room()]
    return min((limit for limit in limits if limit is not None), default=None)


def meminfo(field: str) -> int | None:
    """A field of /proc/meminfo, in bytes; None if it is not there."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def release_memory() -> None:
    """Give back what nobody uses any more: cycles, which the collector would leave until there are many
    (a traced graph is full of them and holds each weight of its model, and so are ended requests), and
    what the C library keeps of freed memory, in whole pages, where it is glibc."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cgroup_room() -> int | None:
    """Bytes left in the container's memory limit (cgroup v2); None without a limit."""
    limit = _lines(Path("/sys/fs/cgroup/memory.max"))
    used = _lines(Path("/sys/fs/cgroup/memory.current"))
    if not limit or not used or limit[0] == "max":
        return None
    return max(0, int(limit[0]) - int(used[0]))


def _process_room() -> int | None:
    """Bytes left of the address space that this process may have (`ulimit -v`); None without a limit."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines(Path("/proc/self/statm"))
    if most == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, most - int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE"))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
