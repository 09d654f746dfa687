"""Ctrl-C, SIGTERM and SIGHUP: one orderly way out. A second one changes nothing."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 130


class Interrupted(BaseException):
    """Somebody wants this to end now. Not an Exception: only main.py and clean-ups meet it."""


def turn_into_exceptions() -> None:
    """From here on the first of these signals raises Interrupted in the main thread.

    One that is ignored already (nohup) stays ignored.
    """
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _raise)


class _Held:
    """Blocks that hold signals back now, and the signal that waits for their end."""

    depth = 0
    waiting: int | None = None


@contextmanager
def held_back() -> Iterator[None]:
    """Let the block finish, such as the stopping of processes; the signal takes effect after it.

    Not by a signal mask: that is a thread's own, and the kernel would hand the signal to another.
    """
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
    if _Held.depth == 0 and _Held.waiting is not None:
        number, _Held.waiting = _Held.waiting, None
        _raise(number, None)


def _raise(number: int, frame: FrameType | None) -> None:
    if _Held.depth:
        _Held.waiting = number
        return
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)
