"""`python -m baton.cluster.standby PARENT MODULE ... ROOM`: import the modules, wait, become another.

The parent (baton/cluster/spare.py) writes one line to stdin, a Unix socket: {"module", "arguments",
"descriptors"}, and with it open files: stdout, stderr and one for each of the descriptors. Then this
process does what `python -m module arguments` would do. Until then it has no model, no socket of a
cluster and no GPU context. It ends when stdin is closed, and with its parent.

ROOM is blank: the new command line, as /proc and `ps` show it, is written into its place.
"""

import ctypes
import importlib
import json
import os
import runpy
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from baton.cluster.launch import calm_openmp
from baton.host import die_with, process_age_s

COMMAND = "baton.cluster.standby"
MOST_DESCRIPTORS = 16
DESCRIPTORS = ("--fd", "--pulse")
"""Options whose value is the number of an inherited descriptor."""
ROOM = " " * 4000
ARGUMENTS = slice(45, 47)  # arg_start and arg_end, in /proc/PID/stat from the field `state` on


def main() -> None:
    """Wait, then run the command. Returns when stdin is closed."""
    parent, *modules, _ = sys.argv[1:]
    if not die_with(int(parent)):
        return
    calm_openmp()
    orders: list[tuple[str, list[str]]] = []
    # A thread, so that an order given during the imports is shown at once. It ends before the command.
    waiting = threading.Thread(target=_await_order, args=(orders,), daemon=True)
    waiting.start()
    for each in modules:
        importlib.import_module(each)
    waiting.join()
    for module, arguments in orders:
        sys.argv = [module, *arguments]
        if module.endswith("_worker"):  # its timeline begins with its own time
            sys.argv += ["--idle", f"{process_age_s():.3f}"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _await_order(orders: list[tuple[str, list[str]]]) -> None:
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as stdin:
        line, received, *_ = socket.recv_fds(stdin, 65536, MOST_DESCRIPTORS)
        while line and not line.endswith(b"\n"):
            more = stdin.recv(65536)
            if not more:
                return  # the parent died meanwhile
            line += more
    if line:
        order = json.loads(line)
        module = order["module"]
        outputs, own = received[:2], received[2:]
        arguments = renumbered(
            order["arguments"], dict(zip(order["descriptors"], own, strict=True))
        )
        _redirect(*outputs)
        show_command([*sys.orig_argv[: sys.orig_argv.index("-m") + 1], module, *arguments])
        orders.append((module, arguments))


def renumbered(arguments: list[str], own: Mapping[int, int]) -> list[str]:
    """The arguments, with this process's numbers of the descriptors that they name."""
    found = list(arguments)
    for place, option in enumerate(arguments[:-1]):
        if option in DESCRIPTORS:
            found[place + 1] = str(own[int(arguments[place + 1])])
    return found


def _redirect(stdout: int, stderr: int) -> None:
    """Take these as stdout and stderr, and stdin from nowhere."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)


def show_command(words: list[str]) -> None:
    """Let /proc/self/cmdline show these words: people, and programs that look for a worker, read it. Only
    where the system has it, and as far as there is room."""
    with suppress(OSError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = (int(each) for each in fields[ARGUMENTS])
        text = b"".join(os.fsencode(word) + b"\0" for word in words)
        if start < end and len(text) < end - start:
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
