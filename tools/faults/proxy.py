"""Proxy: a faulty TCP link between processes: delay, throttle, flipped bits, cuts, silence.

It runs in a thread of its own; its faults may be changed while bytes flow.
"""

import asyncio
import random
import threading
from dataclasses import dataclass
from typing import Any

CHUNK = 16 * 1024


@dataclass(slots=True)
class Faults:
    """What happens to bytes on their way, in both directions."""

    delay_s: float = 0.0  # added to every chunk; chunks stay in order
    bytes_per_s: float = 0.0  # 0: no limit
    flip: float = 0.0  # probability that a chunk gets one bit flipped
    silent: bool = False  # connections stay open, nothing passes


class Proxy:
    """A context manager. Listens on 127.0.0.1:`port` and connects to `target`."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self.faults = Faults()
        self.port = 0
        self.flipped = self.cuts = 0
        self._target = target
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._server = self._call(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *, half: bool = False) -> int:
        """Close every connection; `half`: only the direction to the target. How many there were."""

        async def close() -> int:
            for here, there in list(self._pairs):
                if half:
                    there.write_eof()
                else:
                    here.transport.abort()
                    there.transport.abort()
            self.cuts += len(self._pairs)
            return len(self._pairs)

        return int(self._call(close()))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            reader2, writer2 = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, writer2)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(reader, writer2), self._pump(reader2, writer))
        except (OSError, RuntimeError):  # RuntimeError: the transport was aborted
            pass
        finally:
            self._pairs.discard(pair)
            for each in pair:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction. Bytes are delayed in a queue, so that a delay does not throttle."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)
        clock = self._loop.time

        async def read() -> None:
            while data := await reader.read(CHUNK):
                await queue.put((clock() + self.faults.delay_s, self._damaged(data)))
            await queue.put((clock(), b""))

        reading = asyncio.ensure_future(read())
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - clock()))
                while self.faults.silent:
                    await asyncio.sleep(0.01)
                if not data:
                    break
                if rate := self.faults.bytes_per_s:
                    await asyncio.sleep(len(data) / rate)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
            await reading
        finally:
            reading.cancel()

    def _damaged(self, data: bytes) -> bytes:
        if self._rng.random() >= self.faults.flip:
            return data
        self.flipped += 1
        changed = bytearray(data)
        changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)
