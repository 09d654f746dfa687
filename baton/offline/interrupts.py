"""Ctrl-C, SIGTERM and SIGHUP end the job in order. Further signals are ignored."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 130


class Interrupted(BaseException):
    """The user ended the program. Not an Exception: only main.py and `finally` blocks handle it."""


def turn_into_exceptions() -> None:
    """Make the first of these signals raise Interrupted in the main thread.

    A signal that is ignored already (nohup) stays ignored.
    """
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _raise)


class _Held:
    """How many blocks hold signals back, and the signal that arrived meanwhile."""

    depth = 0
    waiting: int | None = None


@contextmanager
def held_back() -> Iterator[None]:
    """Delay signals until the end of the block, such as the stopping of processes.

    A signal mask would not do: it holds for one thread, and the kernel would pick another.
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
