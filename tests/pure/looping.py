"""A node that writes down what it is given, a channel without a network, processes to watch: what tests
of the loop share."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import zmq

from baton.wire import messages as msg
from baton.wire.node import Effect, Stop

MANY_TURNS = 2000


class Recorder:
    """A node that writes down what it is given, and answers with what it is told to."""

    def __init__(self, *, steps: list[list[Effect]] | None = None) -> None:
        self.handled: list[tuple[str, msg.Message]] = []
        self.answers: Callable[[msg.Message], list[Effect]] = lambda message: []
        self.steps = steps or []
        self.turns = 0

    def handle(self, sender: str, message: msg.Message, now: float) -> list[Effect]:
        self.handled.append((sender, message))
        return self.answers(message)

    def step(self, now: float) -> list[Effect]:
        self.turns += 1
        if self.turns > MANY_TURNS:
            return [Stop(9, "nothing came of it")]
        return self.steps.pop(0) if self.steps else []

    def due(self, now: float) -> float:
        return 0.0 if self.steps else 0.01


class PretendChannel:
    """No network: what is sent is kept, some peers are out of reach."""

    def __init__(self, *, unreachable: set[str] | None = None) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.unreachable = unreachable or set()
        self.sent: list[tuple[str, msg.Message]] = []
        self.calls: list[tuple[str, int]] = []  # to whom, how many messages together
        OPEN.append(self)

    def send(self, peer: str, *messages: msg.Message) -> bool:
        if peer in self.unreachable:
            return False
        self.sent += [(peer, message) for message in messages]
        self.calls.append((peer, len(messages)))
        return True

    def receive(self) -> Iterator[tuple[str, list[msg.Message]]]:
        return iter(())

    def close(self) -> None:
        self.socket.close()
        self._context.term()


class Ticking:
    """A clock that moves on by a millisecond whenever it is looked at."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


OPEN: list[PretendChannel] = []
"""Pretend channels of the test that runs; closed behind it."""


def close_pretend_channels() -> None:
    while OPEN:
        OPEN.pop().close()


@contextlib.contextmanager
def child(code: str = "import sys; sys.stdin.read()") -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when its stdin is closed; it is waited for at the very end only."""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def zombie(process: subprocess.Popen[bytes]) -> int:
    """The pid, once the process has ended and nobody has waited for it."""
    assert process.stdin is not None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process.pid
