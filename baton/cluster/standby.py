"""`python -m baton.cluster.standby PARENT MODULE ... ROOM`: import the modules, wait, become a worker.

The parent (baton/cluster/spare.py) writes one line to stdin, {"module", "arguments", "log"}. Then this
process does what `python -m module arguments` would do, with its output in the log. Until then it has
no model, no socket and no GPU context. It ends when stdin is closed, and with its parent.

ROOM is blank: the worker's command line, as /proc and `ps` show it, is written into its place.
"""

import ctypes
import importlib
import json
import os
import runpy
import sys
import threading
from contextlib import suppress

from baton.cluster.launch import calm_openmp
from baton.host import die_with, process_age_s, process_stat

COMMAND = "baton.cluster.standby"
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
        sys.argv = [module, *arguments, "--idle", f"{process_age_s():.3f}"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _await_order(orders: list[tuple[str, list[str]]]) -> None:
    line = sys.stdin.buffer.readline()
    if line:
        order = json.loads(line)
        module, arguments = order["module"], order["arguments"]
        _log_to(order["log"])
        show_command([*sys.orig_argv[: sys.orig_argv.index("-m") + 1], module, *arguments])
        orders.append((module, arguments))


def _log_to(path: str) -> None:
    """Take stdout and stderr to the end of this file, and stdin from nowhere."""
    for name, flags, numbers in (
        (os.devnull, os.O_RDONLY, (0,)),
        (path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, (1, 2)),
    ):
        descriptor = os.open(name, flags, 0o600)
        for number in numbers:
            os.dup2(descriptor, number)
        os.close(descriptor)


def show_command(words: list[str]) -> None:
    """Let /proc/self/cmdline show these words: people, and programs that look for a worker, read it. Only
    where the system has it, and as far as there is room."""
    with suppress(OSError, ValueError):
        start, end = (int(each) for each in process_stat("self")[ARGUMENTS])
        text = b"".join(os.fsencode(word) + b"\0" for word in words)
        if start < end and len(text) < end - start:
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
