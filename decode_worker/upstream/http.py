"""HttpUpstream: the sockets under an EngineWorker. One thread runs all requests; one connection each.

What comes is queued for the node's thread, which is woken through a ZeroMQ socket. A call that is closed
closes its connection: servers take that as a cancellation.
"""

import asyncio
import json
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import h11
import zmq

from baton.errors import InputError
from decode_worker.upstream.dialects import DIALECTS, Json
from decode_worker.upstream.events import EventReader
from decode_worker.upstream.health import Look
from decode_worker.upstream.node import Broken, Ended, Events, Heard, Looked, Refused
from decode_worker.upstream.survey import (
    Expected,
    Reply,
    Survey,
    Unfit,
    Unready,
    changed,
    message_of,
    reason_of,
    refused,
    still_there,
    survey,
)

CONNECT_S = 5.0
LOOK_S = 5.0
"""For a look. The completion of a survey waits behind others: it has SURVEY_S."""
SURVEY_S = 60.0
LARGEST_REPLY = 1 << 22
READ_BYTES = 1 << 16
WAKE = "inproc://upstream"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an upstream listens. `base` is a path before /v1."""

    host: str
    port: int
    base: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises InputError unless it is http://HOST[:PORT][/BASE] or https://..."""
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise InputError(f"--upstream {url!r} is no URL: {error}") from error
        plain = url.isascii() and url.isprintable() and not {*"@?# "} & {*url}
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise InputError(
                f"--upstream must be http://HOST:PORT or https://HOST:PORT, got {url!r}; a key "
                "belongs into --upstream-key-file"
            )
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, base, parts.scheme == "https")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base}"


class HttpUpstream:
    """The real Upstream (see node.py)."""

    def __init__(self, address: Address, expected: Expected, *, key: str, silence_s: float) -> None:
        """`silence_s`: the longest wait for the head of an answer, and then for more data in it."""
        self._address, self._expected, self._key = address, expected, key
        self._silence_s = silence_s
        self._tls = ssl.create_default_context() if address.tls else None
        self._first: Survey | None = None
        self._heard: deque[Heard | BaseException] = deque()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._context = zmq.Context()
        self._woken = self._context.socket(zmq.PULL)
        self._woken.bind(WAKE)
        self._waker = self._context.socket(zmq.PUSH)  # used by the other thread alone
        self._waker.connect(WAKE)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="upstream")
        self._thread.start()

    # ---- from the node's thread

    def survey(self) -> Survey:
        """What serves there, now. Raises Unready or Unfit."""
        fetch = partial(self._fetch, within_s=SURVEY_S)
        running = asyncio.run_coroutine_threadsafe(survey(fetch, self._expected), self._loop)
        self._first = running.result()
        return self._first

    def ask(self, call: int, path: str, body: Json) -> None:
        self._loop.call_soon_threadsafe(self._begin, call, path, body)

    def close(self, call: int) -> None:
        self._loop.call_soon_threadsafe(self._cancel, call)

    def look(self, how: Look) -> None:
        self._loop.call_soon_threadsafe(self._run, self._look(how))

    def poll(self) -> list[Heard]:
        with suppress(zmq.Again):
            while True:
                self._woken.recv(zmq.NOBLOCK)
        heard: list[Heard] = []
        while self._heard:
            each = self._heard.popleft()
            if isinstance(each, BaseException):
                raise each  # a bug in the other thread
            heard.append(each)
        return heard

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """Readable when poll() has something."""
        return (self._woken,)

    def shut(self) -> None:
        """Close all connections and end the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._woken.close()
        self._waker.close()
        self._context.term()

    # ---- in the other thread

    def _tell(self, heard: Heard | BaseException) -> None:
        self._heard.append(heard)
        with suppress(zmq.Again):  # enough wake-ups are waiting
            self._waker.send(b"", zmq.NOBLOCK)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._tell(error)

    def _begin(self, call: int, path: str, body: Json) -> None:
        self._calls[call] = self._run(self._stream(call, path, body))
        self._calls[call].add_done_callback(lambda _: self._calls.pop(call, None))

    def _cancel(self, call: int) -> None:
        if (task := self._calls.pop(call, None)) is not None:
            task.cancel()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _look(self, how: Look) -> None:
        """LIGHT: it answers. WHOLE: it is what it was."""
        tell = partial(Looked, how)
        try:
            if how is Look.WHOLE and self._first is not None:
                fetch = partial(self._fetch, within_s=SURVEY_S)
                self._tell(tell(changed(self._first, await survey(fetch, self._expected))))
                return
            dialect = DIALECTS[self._first.dialect if self._first else "other"]
            reply = await self._fetch("GET", dialect.health, None, within_s=LOOK_S)
            fails = reply.status in (401, 403) or reply.status >= 500
            why = (
                f"{dialect.health} answered {reply.status}: {message_of(reply.body)}"
                if fails
                else ""
            )
            if not why and self._first is not None:
                why = await still_there(partial(self._fetch, within_s=LOOK_S), self._first)
            self._tell(tell(why))
        except (Unready, Unfit) as error:
            self._tell(tell(str(error)))
        except OSError as error:
            self._tell(tell(reason_of(error), refused(error)))

    async def _stream(self, call: int, path: str, body: Json) -> None:
        begun, other = False, ""
        try:
            async with self._request("POST", path, body) as exchange, self._patience() as patience:
                begun = True
                head = await exchange.head()
                if head.status_code != 200:
                    patience.reschedule(None)  # it has a limit of its own
                    await self._refused(call, head, exchange)
                    return
                patience.reschedule(self._loop.time() + self._silence_s)
                reader = EventReader(streamed=b"json" not in _header(head, b"content-type"))
                known = 0
                async for data in exchange.body():
                    if events := reader.feed(data):
                        self._tell(Events(call, tuple(events)))
                    if reader.data > known:
                        known, other = reader.data, ""
                        patience.reschedule(self._loop.time() + self._silence_s)
                    else:
                        other = " but comments"
                if events := reader.end():
                    self._tell(Events(call, tuple(events)))
                self._tell(Ended(call))
        except TimeoutError as error:
            silent = f"it sent nothing{other} for {self._silence_s:g} s"
            self._tell(Broken(call, silent if begun else reason_of(error), begun))
        except (OSError, h11.RemoteProtocolError, ValueError) as error:
            self._tell(Broken(call, reason_of(error), begun))

    def _patience(self) -> asyncio.Timeout:
        return asyncio.timeout(self._silence_s)

    async def _refused(self, call: int, head: h11.Response, exchange: "_Exchange") -> None:
        """The status says it; the reason is told as far as it comes soon."""
        body = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(LOOK_S, self._silence_s / 2)):
                async for data in exchange.body():
                    body += data[: LARGEST_REPLY - len(body)]
                    if len(body) == LARGEST_REPLY:
                        break
        after = _header(head, b"retry-after").decode("ascii", "replace")
        retry = float(after) if after.isdecimal() else None
        self._tell(Refused(call, head.status_code, message_of(body), retry))

    async def _fetch(self, method: str, path: str, body: Json | None, *, within_s: float) -> Reply:
        """A whole reply. Raises OSError."""
        try:
            async with asyncio.timeout(within_s), self._request(method, path, body) as exchange:
                head, found = await exchange.head(), b""
                async for data in exchange.body():
                    found += data
                    if len(found) > LARGEST_REPLY:
                        raise OSError(f"{path} has more than {LARGEST_REPLY:,} bytes")
                return Reply(head.status_code, found)
        except h11.RemoteProtocolError as error:
            raise OSError(reason_of(error)) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Json | None
    ) -> AsyncIterator["_Exchange"]:
        """Connect and send. The connection ends with the block."""
        address, data = self._address, b"" if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    address.host, address.port, ssl=self._tls
                )
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {CONNECT_S:g} s") from error
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [
                ("Host", f"{address.host}:{address.port}"),
                ("Connection", "close"),
                ("Accept", "application/json, text/event-stream"),
                ("Content-Length", str(len(data))),
            ]
            if body is not None:
                headers.append(("Content-Type", "application/json"))
            if self._key:
                headers.append(("Authorization", f"Bearer {self._key}"))
            head = h11.Request(method=method, target=address.base + path, headers=headers)
            sent = [connection.send(head), connection.send(h11.Data(data=data))]
            writer.write(
                b"".join(part or b"" for part in [*sent, connection.send(h11.EndOfMessage())])
            )
            async with asyncio.timeout(self._silence_s):
                await writer.drain()
            yield _Exchange(connection, reader)
        finally:
            writer.transport.abort()


class _Exchange:
    """The reply on one connection, as slowly as it comes. Raises OSError or h11.RemoteProtocolError."""

    def __init__(self, connection: h11.Connection, reader: asyncio.StreamReader) -> None:
        self._connection, self._reader = connection, reader

    async def head(self) -> h11.Response:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise OSError("it closed the connection without an answer")

    async def body(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def _next(self) -> object:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._reader.read(READ_BYTES))
        return event


def _header(head: h11.Response, name: bytes) -> bytes:
    return next((value for key, value in head.headers if key == name), b"")
