"""Ends: a process that was started with a session of its own ends with all that it has started:
compilers, other ranks, sandboxes. Those would end by themselves, but not while they are stopped, and late
if they still import.

A group is killed only while its first process is there, as a zombie too: then nobody else has its number.
"""

import os
import select
import signal
import subprocess
from contextlib import suppress

Process = subprocess.Popen[bytes]


def ended(process: Process) -> int | None:
    """Its return code, once it has ended; then its group is killed. None: it runs."""
    if process.returncode is None and hasattr(os, "waitid"):
        with suppress(ChildProcessError):
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                _kill_group(process)
    return process.poll()


def kill(process: Process, within_s: float) -> None:
    """Kill it and its group. One that hangs in the kernel (a GPU's driver, a network's file system) ends
    when that lets it go: it is waited for no longer than this, and its end is seen later, as that of
    others."""
    if process.returncode is not None:
        return
    _kill_group(process)
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(within_s)


def await_end(process: Process, within_s: float) -> None:
    """Wait until it has ended, for so long at most. ended() tells whether it has."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (OSError, AttributeError):  # AttributeError: not on this system
        with suppress(subprocess.TimeoutExpired):
            process.wait(within_s)
        return
    try:
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        ready.poll(within_s * 1000)
    finally:
        os.close(descriptor)


def _kill_group(process: Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
