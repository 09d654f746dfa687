"""The real router process, with its loop, msgpack and ZeroMQ, and a second process that plays the others.

Both ends talk over ipc, as on one host. Counted is the CPU time of the router's process: that of its main
thread (node and msgpack), which limits what it carries, and that of ZeroMQ's I/O thread beside it.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import zmq

from baton.clock import monotonic
from baton.lifecycle import State
from baton.wire import messages as msg
from baton.wire.channel import Listener
from baton.wire.codec import decode, encode
from baton.wire.loop import Loop
from baton.wire.messages import Message
from baton.wire.node import Effect, Stop
from tools.benchmarks.pretend_cluster import (
    CLIENT,
    PretendWorkers,
    pool_for,
    pretend_router,
    submission,
)

PROMPT = 64
AHEAD = 2
"""Rounds of tokens that are on their way at once."""


class Counted:
    """A Node: the router, and what it has cost since its first request and since its first token."""

    def __init__(self, running: int, tokens: int) -> None:
        self._router = pretend_router(running, monotonic)
        self._running, self._tokens, self._seen = running, tokens, 0
        self._at: list[tuple[float, float]] = []  # CPU time of the process and of this thread

    @property
    def spent(self) -> list[tuple[float, float]]:
        """Seconds of the process and of its main thread: for all requests, and for all tokens."""
        return [
            (after[0] - before[0], after[1] - before[1])
            for before, after in zip(self._at[::2], self._at[1::2], strict=True)
        ]

    def _mark(self) -> None:
        self._at.append((time.process_time(), time.thread_time()))

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        """As the router does."""
        if isinstance(message, msg.Submit) and not self._at:
            self._mark()
        if isinstance(message, msg.Decoded):
            if len(self._at) == 2:
                self._mark()
            self._seen += sum(len(each.token_ids) for each in message.runs)
        return self._router.handle(sender, message, now)

    def step(self, now: float) -> list[Effect]:
        """As the router does. Ends when it has seen all tokens."""
        effects = self._router.step(now)
        if len(self._at) == 1 and self._router.ledger.count(State.DECODING) == self._running:
            self._mark()
        if self._seen < self._tokens:
            return effects
        self._mark()
        return [*effects, Stop(0, "")]

    def due(self, now: float) -> float:
        """As the router's."""
        return self._router.due(now)


def carried(workers: int, running: int, each: int, tokens: int) -> list[tuple[float, float]]:
    """CPU seconds of the process and of its main thread for each request and for each token. `each`:
    tokens of a run in one message."""
    with tempfile.TemporaryDirectory() as folder:
        channel = Listener(f"ipc://{Path(folder) / 'router.sock'}")
        node = Counted(running, tokens)
        arguments = (channel.address, workers, running, each, tokens)
        command = [sys.executable, "-m", __name__, *map(str, arguments)]
        with subprocess.Popen(command) as others:
            try:
                code = Loop(node, channel, parent=None).run()
            finally:
                others.kill()
                channel.close()
        assert code == 0
    requests, told = node.spent
    return [
        (requests[0] / running, requests[1] / running),
        (told[0] / tokens, told[1] / tokens),
    ]


# ---- the other process


class Others:
    """All workers and the client, each with a socket of its own."""

    def __init__(self, address: str, workers: PretendWorkers) -> None:
        self._context, self._workers = zmq.Context(), workers
        self._poller, self._names = zmq.Poller(), dict[object, str]()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self.received = 0  # tokens, by the client
        for name in (CLIENT, *workers.filling, *workers.decoding):
            socket = self._context.socket(zmq.DEALER)
            socket.identity, socket.sndhwm, socket.rcvhwm = name.encode(), 0, 0
            socket.connect(address)
            self._poller.register(socket, zmq.POLLIN)
            self._names[socket], self._sockets[name] = name, socket

    def send(self, name: str, *messages: Message) -> None:
        self._sockets[name].send_multipart([encode(message) for message in messages])

    def turn(self) -> None:
        """Read what has arrived and answer it; heartbeats keep the silent alive."""
        for socket, _ in self._poller.poll(100):
            name = self._names[socket]
            with contextlib.suppress(zmq.Again):
                while True:
                    self._read(name, socket.recv_multipart(zmq.DONTWAIT))

    def _read(self, name: str, frames: list[bytes]) -> None:
        messages = [decode(frame) for frame in frames]
        if name == CLIENT:
            self.received += sum(len(e.token_ids) for each in messages for e in _emitted(each))
            return
        answers = [self._workers.answer(name, each) for each in messages]
        if found := [each for each in answers if each is not None]:
            self.send(name, *found)

    def beat(self) -> None:
        """Every worker's heartbeat."""
        for name in self._sockets:
            if name != CLIENT:
                self.send(name, msg.Heartbeat(f"{name}/0", 1))


def _emitted(message: Message) -> Iterator[msg.Emitted]:
    match message:
        case msg.Emissions(emitted):
            yield from emitted
        case msg.Emitted():
            yield message


def play(address: str, workers: int, running: int, each: int, tokens: int) -> None:
    """Join, submit, and report tokens until the router ends."""
    new = tokens // running + 10 * each + 64
    pretend = PretendWorkers(workers, pool_for(workers, running, PROMPT + new))
    others = Others(address, pretend)
    for hello in pretend.hellos():
        others.send(hello.worker, hello)
    for number in range(running):
        others.send(CLIENT, submission(number, PROMPT, new))
    beaten, sent = time.monotonic(), defaultdict[str, int](int)
    while True:
        others.turn()
        if time.monotonic() - beaten > 1.0:
            beaten = time.monotonic()
            others.beat()
        started = sum(map(len, pretend.decoding.values())) == running
        while started and sum(sent.values()) - others.received < AHEAD * running * each:
            for name in pretend.decoding:
                if (decoded := pretend.decode(name, each)) is not None:
                    others.send(name, decoded)
                    sent[name] += len(decoded.runs) * each


if __name__ == "__main__":
    play(sys.argv[1], *map(int, sys.argv[2:]))
