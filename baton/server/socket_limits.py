"""Socket limits: what one WebSocket client may send, in time, in frames and at once.

    bytes -> pieces of PIECE -> uvicorn's and websockets' parsers -> messages -> websocket.py

The parsers bound the size of a message. They parse all that has arrived in one go, 43,000 empty frames
from one read, keep frames without bytes for ever, and wait for the rest of a message for ever.
"""

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from baton.server.admission import Body
from baton.server.api_error import ApiError
from baton.server.connection import ServerTransport

MESSAGE_S = 10.0
"""Time limit for a whole message, as for a body."""
MOST_FRAMES = 1024
"""Frames in one message."""
PIECE = 4096
"""Bytes parsed, some milliseconds of the smallest frames, before the event loop gets its turn."""


class StrictWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's, with the limits of this file."""

    transport: ServerTransport
    _timer: asyncio.TimerHandle | None = None
    _parsing = False

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._unparsed = bytearray()

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        if not self._parsing:
            self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unparsed.clear()
        self._message_ends()
        self.transport.lost()
        super().connection_lost(exc)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MOST_FRAMES:
            self._refuse(1009, f"at most {MOST_FRAMES:,} frames in a message")
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._message_ends()
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self._refuse(1007, "text must be UTF-8")
                return
        super().send_receive_event_to_app()

    def _parse(self) -> None:
        """One piece; the next one in the loop's next turn."""
        piece = bytes(self._unparsed[:PIECE])
        del self._unparsed[:PIECE]
        self._count(len(piece))
        if not self.transport.is_closing():
            super().data_received(piece)
        if self.transport.is_closing():
            self._unparsed.clear()
            self._message_ends()
        elif not (self.frames or self.conn.reader.buffer):
            self._message_ends()
        elif self._timer is None:
            self._timer = self.loop.call_later(MESSAGE_S, self._too_late)
        self._parsing = bool(self._unparsed)
        self.transport.hold(self._parsing)
        if self._parsing:
            self.loop.call_soon(self._parse)

    def _count(self, size: int) -> None:
        body = self._body()
        try:
            if body is not None:
                body.add(size)
        except ApiError as error:
            self._refuse(1013, error.message[:120])

    def _body(self) -> Body | None:
        """Its account of unfinished bytes, from guard.py; None before the handshake."""
        scope: Any = getattr(self, "scope", None) or {}
        found: Body | None = scope.get("state", {}).get("body")
        return found

    def _message_ends(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (body := self._body()) is not None:
            body.close()

    def _too_late(self) -> None:
        self._timer = None
        if (
            self.read_paused or self._parsing
        ):  # this server does not read: the client is not to blame
            self._timer = self.loop.call_later(MESSAGE_S, self._too_late)
        else:
            self._refuse(1008, f"a message was not complete within {MESSAGE_S:g} s")

    def _refuse(self, code: int, reason: str) -> None:
        self.frames = []
        if not self.transport.is_closing():
            self.conn.fail(code, reason)
            self.handle_parser_exception()
