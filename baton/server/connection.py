"""Connection: HTTP/1.1 on one socket, under h11 and uvicorn, for clients of every kind.

    a head that is late, or that two servers could read in two ways   closed, or 400 and closed
    a body that the response did not wait for                         the rest is dropped, then closed
    a client that does not read                                       cut off

Every way to end a connection ends it: within LINGER_S, or while the client reads what is left for it.
"""

import asyncio
import logging
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from baton.server.api_error import ApiError, response
from baton.server.crowd import Crowd, Member

HEAD_S = 10.0
"""Time limit for the head of a request."""
HEAD_BYTES = 16 << 10
READ_BYTES = 16 << 10
"""At most so much is read at once. asyncio allocates it before it reads, 256 KiB by default, and a heap
that must have room for that between small pieces grows for hours."""
LINGER_S = 2.0
"""After an early error response, so long the client may go on sending before the connection is reset. At
once, a reset could overtake the response."""
WRITE_S = 30.0
LEAST_BYTES = 1024
"""A client for which something is left must read so many bytes within WRITE_S, or it is cut off."""
RETRY_S = 2
FEW_CHUNKS = 1024
LEAST_CHUNK = 32
"""Of more than FEW_CHUNKS chunks in a body, bytes in each on average: h11 takes 20 us for a chunk."""

END_OF_HEAD = re.compile(rb"\n\r?\n")
BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)")
FIELD = re.compile(rb"\n([^:\r\n]*):[ \t]*([^\r\n]*)")

logger = logging.getLogger(__name__)


def check_head(data: bytes) -> None:
    """Refuses a request whose end two servers could see in two places (RFC 9112, section 6). `data`
    begins with the head; half a head is no error yet. Raises h11.RemoteProtocolError."""
    end = END_OF_HEAD.search(data)
    if end is None:
        return
    head = data[: end.end()]
    if len(head) > HEAD_BYTES:  # h11 looks only while a head is incomplete
        raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
    if BARE.search(head):
        raise h11.RemoteProtocolError("lines must end with CR LF")
    if b"\n " in head or b"\n\t" in head:
        raise h11.RemoteProtocolError("a header must not be continued on the next line")
    fields = [(name.lower(), value.strip()) for name, value in FIELD.findall(head)]
    lengths = [value for name, value in fields if name == b"content-length"]
    coded = any(name == b"transfer-encoding" for name, _ in fields)
    if len(lengths) > 1 or any(not value.isdigit() for value in lengths):
        raise h11.RemoteProtocolError("Content-Length must be one number, given once")
    if coded and lengths:
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    if coded and b"HTTP/1.1" not in head.partition(b"\r\n")[0]:
        raise h11.RemoteProtocolError("Transfer-Encoding needs HTTP/1.1")


class StrictConnection(h11.Connection):
    """Refuses more than h11 does. `refusal`: the last reason."""

    refusal: h11.RemoteProtocolError | None = None
    _chunks = _bytes = 0

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE:
                check_head(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._chunks = self._bytes = 0
            elif isinstance(event, h11.Data):
                self._chunks += event.chunk_start
                self._bytes += len(event.data)
                if self._chunks > FEW_CHUNKS and self._bytes < LEAST_CHUNK * self._chunks:
                    raise h11.RemoteProtocolError("the body's chunks are too small")
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event


class ServerTransport(asyncio.Transport):
    """A transport that ends: it cuts off clients that do not read, and close() lingers where the client
    may still be sending."""

    def __init__(
        self,
        inner: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        unread: Callable[[], bool],
        crowd: Crowd,
    ) -> None:
        """`unread`: may the client be sending more of a request that was answered already?"""
        super().__init__()
        self._inner, self._loop, self._unread = inner, loop, unread
        address = str((inner.get_extra_info("peername") or ("",))[0])
        self._crowd, self.member = crowd, Member(address, self.close, self._reset)
        crowd.came(self.member)
        self._written = 0
        self._since, self._passed = 0.0, 0  # when so many bytes had been passed to the kernel
        self._watch: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._closed = self._paused = self._held = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._written += len(data)
        self._inner.write(data)
        if self._watch is None and self._inner.get_write_buffer_size():
            self._since, self._passed = time.monotonic(), self._in_kernel()
            self._look_again()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._unread() or self._inner.is_closing():
            self._inner.close()
            return
        self._linger = self._loop.call_later(LINGER_S, self._lingered)
        self._inner.resume_reading()  # what comes is thrown away, up to the client's end
        if self._inner.can_write_eof():
            self._inner.write_eof()
        else:  # TLS
            self._inner.close()

    def hold(self, held: bool) -> None:
        """Read nothing meanwhile, whatever resume_reading() says."""
        self._held = held
        self._read_or_not()

    def _read_or_not(self) -> None:
        if self._closed or not (self._held or self._paused):
            self._inner.resume_reading()
        else:
            self._inner.pause_reading()

    def lost(self) -> None:
        """The connection has ended."""
        self._crowd.left(self.member)
        for timer in (self._watch, self._linger):
            if timer is not None:
                timer.cancel()
        self._watch = self._linger = None

    def _lingered(self) -> None:
        if self._inner.get_write_buffer_size():  # of a long response; _look() ends it if it must
            self._linger = self._loop.call_later(LINGER_S, self._lingered)
        else:
            self._reset()

    def _reset(self) -> None:
        """End it for the client too. After a mere close the kernel would keep what it holds for a client
        that does not read, and the connection with it."""
        own = self._inner.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._inner.abort()

    def _in_kernel(self) -> int:
        return self._written - self._inner.get_write_buffer_size()

    def _look_again(self) -> None:
        self._watch = self._loop.call_later(WRITE_S / 4, self._look)

    def _look(self) -> None:
        self._watch = None
        if not self._inner.get_write_buffer_size():
            return
        now, passed = time.monotonic(), self._in_kernel()
        if passed >= self._passed + LEAST_BYTES:
            self._since, self._passed = now, passed
        elif now >= self._since + WRITE_S:
            logger.warning("a client has read nothing for %g s and is disconnected", WRITE_S)
            self._reset()
            return
        self._look_again()

    # ---- the rest is the inner transport's

    def is_closing(self) -> bool:
        return self._closed or self._inner.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner.get_protocol()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def pause_reading(self) -> None:
        self._paused = True
        self._read_or_not()

    def resume_reading(self) -> None:
        self._paused = False
        self._read_or_not()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._inner.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._inner.get_write_buffer_limits()

    def write_eof(self) -> None:
        self._inner.write_eof()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def abort(self) -> None:
        self._inner.abort()


class ServerProtocol(H11Protocol):
    """uvicorn's, with the limits of this file. uvicorn's own timer runs between requests only, and does
    not end half a head ("slowloris")."""

    _head_timer: asyncio.TimerHandle | None = None
    _refused = _upgraded = False
    conn: StrictConnection
    transport: ServerTransport

    def __init__(self, *given: Any, crowd: Crowd) -> None:
        """`crowd`: of all connections of this server."""
        super().__init__(*given)
        self._crowd = crowd

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.conn = StrictConnection(h11.SERVER)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(ServerTransport(transport, self.loop, self._unread, self._crowd))
        if self.transport.member.refused:
            self.app = busy
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        waits = self.conn.their_state is h11.IDLE
        self._rests_or_works(rests=waits)
        if waits and self._head_timer is None:  # the next request on this connection has begun
            self._start_timer()
        elif not waits:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.transport.lost()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._rests_or_works(rests=self.conn.their_state is h11.IDLE)

    def _rests_or_works(self, *, rests: bool) -> None:
        tell = self._crowd.rests if rests and not self.transport.is_closing() else self._crowd.works
        tell(self.transport.member)

    def _should_upgrade(self) -> bool:
        return not self.transport.member.refused and super()._should_upgrade()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """The reason, as an API error. Nothing more is read."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = self.conn.refusal
            status = 431 if refusal and refusal.error_status_hint == 431 else 400
            text = f"the request is not valid HTTP: {refusal or msg}"
            answer = response(ApiError(status, text, code="invalid_http"))
            answer.headers["Connection"] = "close"
            head = h11.Response(status_code=status, headers=answer.raw_headers)
            for part in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _unread(self) -> bool:
        state = self.conn.their_state
        return not self._upgraded and (self._refused or state in (h11.SEND_BODY, h11.ERROR))

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._too_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection that has no place."""
    text = (
        "the server is busy: its connections, or those that one address may have, are all in use; try "
        f"again in {RETRY_S} s"
    )
    error = ApiError(503, text, "server_error", code="overloaded", retry_after=RETRY_S)
    answer = response(error)
    answer.headers["Connection"] = "close"
    await answer(scope, receive, send)
