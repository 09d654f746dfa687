"""Routes of Anthropic's Messages API: answer, stream, count.

body -> MessagesRequest -> chat -> ChatRequest -> service.py -> chunks -> pieces -> Blocks -> events
"""

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from baton.errors import RequestError
from baton.server import bodies
from baton.server.api_error import ApiError, from_failed, messages_body
from baton.server.asking import Asker, Begun, body_size, counted, translated
from baton.server.messages.answer import (
    PING,
    Blocks,
    Event,
    message_of,
    not_stopped,
    stop_of,
    usage_of,
)
from baton.server.messages.schema import NAMES, CountRequest, MessagesRequest
from baton.server.pieces import pieces_of, renamed
from baton.server.schema import ChatRequest
from baton.server.sse import EventStream, event, json_of


def add_messages(app: FastAPI, asker: Asker) -> dict[str, Any]:
    """Returns what FastPath calls for each path."""
    service = asker.service

    @app.post(bodies.Path.MESSAGES, tags=["anthropic"])
    async def messages(request: Request, payload: MessagesRequest) -> Response:
        """Answer a conversation: Anthropic's Messages API."""
        try:
            begun, cut = await begin(request, payload)
            turn = _Turn(payload.model or service.names[0], begun, cut)
            if payload.stream:
                sign = event(PING, "ping")
                return EventStream(
                    turn.events(), begun.headers, keep_alive=sign, close=begun.stream.close
                )
            content = await turn.whole(request)
        except (ApiError, RequestError) as error:
            raise renamed(error, NAMES) from error
        return Response(content, headers=begun.headers, media_type="application/json")

    async def begin(request: Request, payload: MessagesRequest) -> tuple[Begun, bool]:
        """If max_tokens is more than fits beside the prompt, the answer may be as long as fits, and says
        so at its end, as Anthropic's does. The second is whether it is."""
        value = await bodies.in_thread(body_size(request) > bodies.INLINE, payload.chat)
        chat = await translated(ChatRequest, value, request)
        begun = await asker.begin(request, chat, cut=True)
        return begun, begun.prepared.params[0].max_new_tokens < payload.max_tokens

    @app.post(bodies.Path.MESSAGE_TOKENS, tags=["anthropic"])
    async def count_tokens(request: Request, payload: CountRequest) -> Response:
        """How many tokens a request's input has."""
        try:
            value = await bodies.in_thread(body_size(request) > bodies.INLINE, payload.chat)
            tokens = await counted(service, value, request)
        except (ApiError, RequestError) as error:
            raise renamed(error, NAMES) from error
        return JSONResponse({"input_tokens": tokens})

    return {
        bodies.Path.MESSAGES: (MessagesRequest, messages),
        bodies.Path.MESSAGE_TOKENS: (CountRequest, count_tokens),
    }


@dataclass(frozen=True, slots=True)
class _Turn:
    """One message under way."""

    model: str
    begun: Begun
    cut: bool

    async def whole(self, request: Request) -> bytes:
        """The message as JSON. Raises ApiError."""
        stream, blocks = self.begun.stream, Blocks()
        answer = json.loads(await stream.whole(request.receive))
        choice = answer["choices"][0]
        list(blocks.take(pieces_of(choice["message"])))
        list(blocks.end())
        stopped = stop_of(choice["finish_reason"], stream.choices[0].stop, cut=self.cut)
        found = message_of(self._head(), blocks.content, stopped, usage_of(answer["usage"]))
        return json_of(found).encode(errors="replace")  # an input may have half a surrogate pair

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. A chunk's are yielded together."""
        stream, blocks, finish_reason = self.begun.stream, Blocks(), None
        try:
            begins = message_of(self._head(), (), not_stopped(), usage_of(stream.usage()))
            yield _encoded({"type": "message_start", "message": begins}, PING)
            async with contextlib.aclosing(stream.chunks()) as chunks:
                async for chunk in chunks:
                    if "error" in chunk:
                        failed = stream.choices[0].failed
                        assert failed is not None
                        error = from_failed(failed.code, failed.message)
                        yield _encoded(messages_body(error, self.begun.request_id))
                        return
                    for choice in chunk["choices"]:
                        if found := _encoded(*blocks.take(pieces_of(choice["delta"]))):
                            yield found
                        finish_reason = choice["finish_reason"] or finish_reason
            last = list(blocks.end())
            stopped = stop_of(finish_reason, stream.choices[0].stop, cut=self.cut)
            ends = {"type": "message_delta", "delta": stopped, "usage": usage_of(stream.usage())}
            yield _encoded(*last, ends, {"type": "message_stop"})
        finally:
            stream.close()

    def _head(self) -> dict[str, Any]:
        return {"id": f"msg_{secrets.token_hex(12)}", "model": self.model}


def _encoded(*found: Event) -> bytes:
    return b"".join(event(each, each["type"]) for each in found)
