"""Ctrl-C, SIGTERM and SIGHUP end the job in order. Further signals are ignored."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 130


class Interrupted(BaseException):
    """The user ended the program. Not an Exception: only main.py and `finally` blocks handle it."""


@contextmanager
def turned_into_exceptions() -> Iterator[None]:
    """Within the block the first of these signals raises Interrupted in the main thread. The handlers
    are put back at its end, unless a signal came: then the program ends, and ignores further ones.

    A signal that is ignored already (nohup) stays ignored.
    """
    before = {each: signal.getsignal(each) for each in SIGNALS}
    before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, _raise)
    try:
        yield
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is _raise:
                signal.signal(each, handler)


class _Held:
    """How many blocks hold signals back, and the signal that arrived meanwhile."""

    depth = 0
    waiting: int | None = None


@contextmanager
def held_back() -> Iterator[None]:
    """Delay signals until the end of the block, for example while processes are stopped.

    A signal mask is not enough: it applies to one thread, and the kernel would deliver to another.
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
