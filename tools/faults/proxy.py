"""Proxy: a faulty TCP link between processes: delay, throttle, flipped bits, cuts, silence.

It runs in a thread of its own; its faults may be changed while bytes flow.
"""

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

CHUNK = 16 * 1024


@dataclass(slots=True)
class Faults:
    """What happens to bytes on their way, in both directions."""

    delay_s: float = 0.0  # added to every chunk; chunks stay in order
    bytes_per_s: float = 0.0  # 0: no limit
    flip: float = 0.0  # probability that a chunk gets one bit flipped
    silent: bool = False  # connections stay open, nothing passes


async def _until_one_fails(*works: Coroutine[Any, Any, None]) -> None:
    """Both to their end; when one fails, or this is cancelled, neither outlives the call.

    (`gather` leaves the others running, `TaskGroup` wraps the error in a group.)
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Proxy:
    """A context manager. Listens on 127.0.0.1:`port` and connects to `target`.

    Plain sockets, not asyncio's streams: a connection that those are about to take up when the
    loop ends stays open, and its complaint comes in the middle of a later test.
    """

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self.faults = Faults()
        self.port = 0
        self.flipped = self.cuts = 0
        self._target = ("127.0.0.1", target)
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._links: dict[asyncio.Task[None], socket.socket] = {}  # its side of the target
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._accept)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()

    def cut(self, *, half: bool = False) -> int:
        """Close every connection; `half`: only the direction to the target. How many there were."""

        async def close() -> int:
            for link, there in self._links.items():
                if half:
                    with contextlib.suppress(OSError):  # not connected yet
                        there.shutdown(socket.SHUT_WR)
                else:
                    link.cancel()
            self.cuts += len(self._links)
            return len(self._links)

        return int(self._call(close()))

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _close(self) -> None:
        self._loop.remove_reader(self._listener)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        """A connection waits (no `sock_accept`: cancelled in a bad moment, that loses a socket)."""
        with contextlib.suppress(OSError):  # it waits no longer
            here, there = self._listener.accept()[0], socket.socket()
            here.setblocking(False)
            there.setblocking(False)
            link = self._loop.create_task(self._link(here, there))
            self._links[link] = there
            link.add_done_callback(partial(self._ended, here, there))

    def _ended(self, here: socket.socket, there: socket.socket, link: asyncio.Task[None]) -> None:
        del self._links[link]
        here.close()
        there.close()

    async def _link(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            await self._loop.sock_connect(there, self._target)
            await _until_one_fails(self._pump(here, there), self._pump(there, here))

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        """One direction. Bytes are delayed in a queue, so that a delay does not throttle."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)
        clock = self._loop.time

        async def read() -> None:
            while data := await self._loop.sock_recv(source, CHUNK):
                await queue.put((clock() + self.faults.delay_s, self._damaged(data)))
            await queue.put((clock(), b""))

        async def write() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - clock()))
                while self.faults.silent:
                    await asyncio.sleep(0.01)
                if not data:
                    break
                if rate := self.faults.bytes_per_s:
                    await asyncio.sleep(len(data) / rate)
                await self._loop.sock_sendall(target, data)
            target.shutdown(socket.SHUT_WR)

        await _until_one_fails(read(), write())

    def _damaged(self, data: bytes) -> bytes:
        if self._rng.random() >= self.faults.flip:
            return data
        self.flipped += 1
        changed = bytearray(data)
        changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)
