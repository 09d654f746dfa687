"""WebSocket: the same JSON as over HTTP in, the same chunks as over SSE out, and a way to cancel.

    -> {"model": ..., "prompt": ..., ...}     or with "messages": a conversation
    <- {"id": ..., "choices": [...]} ...      one chunk a message, then
    <- {"type": "done", "id": ...}            or {"error": {...}, "id": ...}
    -> {"type": "cancel", "id": ...}          ends it: its choices get finish_reason "abort"

Several requests may be under way at once on one socket. Close codes: 1003 for a binary message, 1008 for
one that is not complete in time, 1009 for one that is too large, 1013 when the server is shutting down
or has too many unfinished messages.
"""

import asyncio
import contextlib
import json
import logging
from typing import Any

from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from baton.errors import RequestError
from baton.log import REQUEST
from baton.server.api_error import ApiError, body, from_request_error
from baton.server.bodies import MAX_BODY_BYTES, JsonScan, Path, feed, limits_of, read
from baton.server.service import GenerationService
from baton.server.stream import GenerationStream

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Requests under way on one socket."""


def add_websocket(app: FastAPI, service: GenerationService) -> None:
    """Add the route /v1/stream."""

    @app.websocket(Path.STREAM)
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        await _Socket(socket, service).run()


class _Socket:
    """One client."""

    def __init__(self, socket: WebSocket, service: GenerationService) -> None:
        self._socket, self._service = socket, service
        self._tenant = str(socket.scope.get("state", {}).get("tenant", ""))
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[str, GenerationStream] = {}

    async def run(self) -> None:
        """Serve until the client disconnects."""
        try:
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                text = message.get("text")
                if text is None:
                    await self._socket.close(1003, "send JSON in text messages")
                    return
                if len(text.encode("utf-8", "surrogatepass")) > MAX_BODY_BYTES:
                    await self._socket.close(1009, f"at most {MAX_BODY_BYTES:,} bytes")
                    return
                if self._service.draining:
                    await self._socket.close(1013, "the server is shutting down")
                    return
                await self._take(text)
        except WebSocketDisconnect:
            pass
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        try:
            payload = await _read(data, self._service.context, self._socket.scope["state"]["turn"])
        except ApiError as error:
            await self._send(body(error))
            return
        if payload.get("type") == "cancel":
            stream = self._streams.get(str(payload.get("id")))
            if stream is not None:
                stream.cancel()
            return
        if len(self._tasks) >= AT_ONCE:
            await self._send(body(ApiError.overloaded(len(self._tasks), AT_ONCE, 1)))
            return
        task = asyncio.create_task(self._answer(payload, len(data)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, payload: dict[str, Any], size: int) -> None:
        name: str | None = None
        try:
            prepared = await self._service.prepare_json(payload, tenant=self._tenant, size=size)
            name = prepared.name
            stream = self._streams[name] = await self._service.begin(prepared)
            async with contextlib.aclosing(stream.chunks()) as chunks:
                async for chunk in chunks:
                    await self._send(chunk if "id" in chunk else chunk | {"id": name})
                    if "error" in chunk:
                        return
            await self._send({"type": "done", "id": name})
        except (ApiError, RequestError) as error:
            known = error if isinstance(error, ApiError) else from_request_error(error)
            await self._send(body(known) | {"id": name})
        except WebSocketDisconnect:
            pass  # run() ends, too
        except Exception as error:
            logger.error("internal error", exc_info=error)
            with contextlib.suppress(WebSocketDisconnect):
                await self._send(body(ApiError.bug(REQUEST.get())) | {"id": name})
        finally:
            if name is not None and (begun := self._streams.pop(name, None)) is not None:
                begun.close()

    async def _send(self, data: dict[str, Any]) -> None:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        if self._socket.application_state is WebSocketState.DISCONNECTED:
            raise WebSocketDisconnect  # closed by us, while this answer was under way
        await self._socket.send_text(text)


async def _read(data: bytes, context: int, turn: asyncio.Lock) -> dict[str, Any]:
    limits = limits_of(Path.STREAM, context)
    assert limits is not None
    await feed(JsonScan(limits), data, turn)
    payload = await read(data)
    if not isinstance(payload, dict):
        raise ApiError.bad_request("send a JSON object")
    return payload
