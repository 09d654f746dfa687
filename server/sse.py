"""Server-sent events: a response that streams, keeps the line alive, and notices who has left.

    data: {...}\\n\\n        one event
    : keep-alive\\n\\n       a comment, when there was nothing to say for a while
    data: [DONE]\\n\\n       the end

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE_S = 15.0
WRITE_S = 30.0
"""Who has not read anything for so long is cut off."""
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

logger = logging.getLogger(__name__)


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event as it goes over the wire."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Streams what a generator yields. The generator is closed whatever ends it: its own end, a client
    that left, or one that does not read."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
    ) -> None:
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            None, headers=quiet | dict(headers or {}), media_type="text/event-stream; charset=utf-8"
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        left = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for task in (pump, left):
                task.cancel()
            await asyncio.gather(pump, left, return_exceptions=True)
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        waiting: asyncio.Task[bytes] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
                try:
                    chunk = waiting.result() if done else KEEP_ALIVE
                except StopAsyncIteration:
                    break
                waiting = None if done else waiting
                body = {"type": "http.response.body", "body": chunk, "more_body": True}
                await asyncio.wait_for(send(body), WRITE_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.warning("a client has read nothing for %.0f s and is cut off", WRITE_S)
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
