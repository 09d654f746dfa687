"""Pulse: how a process shows that its loop turns: bytes in a pipe, which its supervisor reads.

A process may be stopped, or its loop wedged, while its threads and the kernel still answer for it:
ZeroMQ's I/O thread takes messages, a listening socket takes connections. So the loop itself writes, and
nothing is queued in front of the byte: a router under a flood of messages beats while it handles them.
"""

import os
from contextlib import suppress

from baton.clock import Clock, monotonic

EVERY_S = 0.5
READ_BYTES = 65536  # what a pipe holds


class Pulse:
    """The loop's end: call beat() each turn, at least once a second."""

    def __init__(self, descriptor: int, clock: Clock = monotonic) -> None:
        """`descriptor`: the inherited end of a pipe that is written to."""
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._clock = clock
        self._next = clock()

    def beat(self) -> None:
        """Write a byte if the last one is EVERY_S old. A pipe that is full has beats enough for a
        supervisor that is stopped; one that is closed had a supervisor that has ended, which the loop
        notices by itself."""
        now = self._clock()
        if now >= self._next:
            self._next = now + EVERY_S
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._descriptor, b".")


class Ear:
    """The supervisor's end, for one life of a process. `descriptor` is the end to be inherited."""

    def __init__(self) -> None:
        self._listening, self.descriptor = os.pipe()
        os.set_blocking(self._listening, False)

    def inherited(self) -> None:
        """The process has been started: it alone has the other end now."""
        os.close(self.descriptor)

    def heard(self) -> bool:
        """Whether the loop has turned since the last call."""
        with suppress(BlockingIOError):
            return bool(os.read(self._listening, READ_BYTES))
        return False

    def close(self) -> None:
        """The process has ended."""
        os.close(self._listening)
