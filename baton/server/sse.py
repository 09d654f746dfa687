"""Server-sent events: a streaming response with keep-alive comments that notices disconnects.

    data: {...}\\n\\n        one event
    : keep-alive\\n\\n       a comment, after a while without events
    data: [DONE]\\n\\n       the end

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE_S = 15.0
LOOK_S = 1.0
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

json_of = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One encoded event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json_of(data)}\n\n".encode()


class EventStream(Response):
    """Streams the bytes of a generator. Closes the generator at its end, and when the client disconnects.
    (One that stops reading is disconnected by connection.py.) `close` is called then, too: a generator
    that was not begun has nothing that would run."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        *,
        keep_alive: bytes = KEEP_ALIVE,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            None, headers=quiet | dict(headers or {}), media_type="text/event-stream; charset=utf-8"
        )
        del self.headers["content-length"]
        self._events, self._sign, self._close = events, keep_alive, close
        self._last_sent, self._sending = 0.0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_sent, self._sending = time.monotonic(), False
        pump = asyncio.create_task(self._pump(send))
        others = [
            asyncio.create_task(gone(receive)),
            asyncio.create_task(self._keep_alive(send)),
        ]
        try:
            await asyncio.wait({pump, *others}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for task in (pump, *others):
                task.cancel()
            await asyncio.gather(pump, *others, return_exceptions=True)
            await self._events.aclose()
            self._close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await self._send(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: bytes) -> None:
        self._sending = True
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._sending, self._last_sent = False, time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Sends keep-alive comments."""
        while True:
            await asyncio.sleep(LOOK_S)
            silent = time.monotonic() - self._last_sent
            if not self._sending and silent >= KEEP_ALIVE_S:
                await self._send(send, self._sign)


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
