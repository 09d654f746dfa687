"""WebSocket: the same JSON as over HTTP in, the same chunks as over SSE out, and a way to cancel.

    -> {"model": ..., "prompt": ..., ...}     or with "messages": a conversation
    <- {"id": ..., "choices": [...]} ...      one chunk a message, then
    <- {"type": "done", "id": ...}            or {"error": {...}, "id": ...}
    -> {"type": "cancel", "id": ...}          ends it: its choices get finish_reason "abort"

Several requests may be under way at once on one socket. Closed with 1003 for what is no text, 1009 for
what is too big, 1013 when the server is shutting down.
"""

import asyncio
import contextlib
import json
from typing import Any

from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from baton.errors import RequestError
from baton.server.desk import Desk
from baton.server.faults import Fault, body, from_request_error
from baton.server.fields import depth_ok
from baton.server.guard import MAX_BODY_BYTES
from baton.server.job import Job, chunks
from baton.server.sse import WRITE_S
from baton.server.talk import Plan, Talk

AT_ONCE = 64
"""Requests under way on one socket."""


def add_socket(app: FastAPI, desk: Desk, talk: Talk) -> None:
    """Put it at /v1/stream."""

    @app.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        await _Socket(socket, desk, talk).run()


class _Socket:
    """One client."""

    def __init__(self, socket: WebSocket, desk: Desk, talk: Talk) -> None:
        self._socket, self._desk, self._talk = socket, desk, talk
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, Job] = {}

    async def run(self) -> None:
        """Until the client leaves."""
        try:
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                text = message.get("text")
                if text is None:
                    await self._socket.close(1003, "send JSON as text")
                    return
                if len(text) > MAX_BODY_BYTES:
                    await self._socket.close(1009, f"at most {MAX_BODY_BYTES:,} bytes")
                    return
                if self._desk.draining:
                    await self._socket.close(1013, "the server is shutting down")
                    return
                await self._take(text)
        except (WebSocketDisconnect, TimeoutError):
            pass
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, text: str) -> None:
        try:
            asked = _read(text)
        except Fault as fault:
            await self._say(body(fault))
            return
        if asked.get("type") == "cancel":
            job = self._jobs.get(str(asked.get("id")))
            if job is not None:
                job.cancel()
            return
        if len(self._tasks) >= AT_ONCE:
            await self._say(body(Fault.overloaded(len(self._tasks), AT_ONCE, 1)))
            return
        task = asyncio.create_task(self._answer(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: dict[str, Any]) -> None:
        name: str | None = None
        try:
            plan = await self._talk.plan_json(asked)
            name = plan.name
            await self._stream(plan)
        except Fault as fault:
            await self._say(body(fault) | {"id": name})
        except RequestError as error:
            await self._say(body(from_request_error(error)) | {"id": name})

    async def _stream(self, plan: Plan) -> None:
        job = await self._desk.begin(
            plan.generation, plan.prompts, plan.name, plan.echoes, streams=True
        )
        self._jobs[plan.name] = job
        try:
            usage = plan.generation.include_usage
            async with contextlib.aclosing(chunks(job, plan.shape, include_usage=usage)) as all_:
                async for chunk in all_:
                    await self._say(chunk if "id" in chunk else chunk | {"id": plan.name})
                    if "error" in chunk:
                        return
            await self._say({"type": "done", "id": plan.name})
        finally:
            del self._jobs[plan.name]
            job.close()

    async def _say(self, data: dict[str, Any]) -> None:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        await asyncio.wait_for(self._socket.send_text(text), WRITE_S)


def _read(text: str) -> dict[str, Any]:
    if not depth_ok(text.encode("utf-8", "surrogatepass")):
        raise Fault.bad_request("the JSON is nested too deeply")
    try:
        asked = json.loads(text)
    except ValueError as error:
        raise Fault.bad_request(f"this is no JSON: {error}"[:300]) from error
    if not isinstance(asked, dict):
        raise Fault.bad_request("send a JSON object")
    return asked
