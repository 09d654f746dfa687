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


@contextmanager
def held_back() -> Iterator[None]:
    """Let the block finish, such as the stopping of processes; the signal takes effect after it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _raise(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)
