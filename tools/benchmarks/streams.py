"""Streams: an HTTP client with little overhead. It shares the cores with the server, and the benchmark is
not to measure how a client parses text.
"""

import asyncio
import re
import time
from dataclasses import dataclass

LAST_CHUNK = b"\r\n0\r\n\r\n"
"""The end of a chunked body. Earlier chunks end with an event, so with empty lines."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one stream. `failure` is empty if it ended well."""

    tokens: int
    ttft_s: float
    failure: str = ""


class Connection(asyncio.Protocol):
    """One stream after the other over a connection. A stream is parsed when it has ended."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._tail = b""
        self._first: float | None = None
        self._ended: asyncio.Future[None] | None = None

    async def ask(self, port: int, request: bytes) -> Answer:
        """Send a request and wait for the end. Raises OSError or ValueError for a stream that ends
        badly."""
        loop = asyncio.get_running_loop()
        begun = time.monotonic()
        if self._transport is None:
            await loop.create_connection(lambda: self, "127.0.0.1", port)
        assert self._transport is not None
        self._parts, self._tail, self._first = [], b"", None
        self._ended = loop.create_future()
        self._transport.write(request)
        await self._ended
        tokens = tokens_of(b"".join(self._parts))
        return Answer(tokens, (self._first or begun) - begun)

    def close(self) -> None:
        """Close; the next stream opens a new connection."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._parts and not data.startswith(b"HTTP/1.1 200 "):
            self._end(ValueError(f"the answer is {data[:200]!r}"))
        self._parts.append(data)
        seen = self._tail + data
        if self._first is None and b"data: {" in seen:
            self._first = time.monotonic()
        self._tail = seen[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(exc or ConnectionResetError("the server closed the stream"))

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


def tokens_of(stream: bytes) -> int:
    """Completion tokens from the usage of a stream. Raises ValueError unless it ended well."""
    if b'"error"' in stream or b"data: [DONE]" not in stream:
        raise ValueError(f"the stream ended with {stream[-200:]!r}")
    if b'"finish_reason":"length"' not in stream:
        raise ValueError("the stream ended without its finish_reason")
    found = re.findall(rb'"completion_tokens":(\d+)', stream)
    if len(found) != 1:
        raise ValueError(f"the stream reported its usage {len(found)} times")
    return int(found[0])
