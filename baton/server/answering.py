"""Answering: a short way to the two routes that generate.

A framework's way to a route (routing, reading the body, dependencies, middleware around each) takes as
much CPU as all the rest of a request here. So a sound request to one of these two is answered before it;
everything else, above all what is wrong, goes on to the same routes in app.py, and is told what is wrong
there.
"""

import json
from collections.abc import Awaitable, Callable, Mapping

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.errors import RequestError
from baton.server.chatting import ChatRequest
from baton.server.faults import Fault, from_request_error
from baton.server.guard import replay
from baton.server.protocol import CompletionRequest

Asked = CompletionRequest | ChatRequest

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
KINDS: Mapping[str, type[CompletionRequest] | type[ChatRequest]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatRequest,
}
JSON = "application/json"


class Answering:
    """Pure ASGI, within the guard and around the framework's routes."""

    def __init__(
        self,
        app: ASGIApp,
        answer: Callable[[Request, Asked], Awaitable[Response]],
        refuse: Callable[[str, Fault], Response],
    ) -> None:
        self._app = app
        self._answer = answer
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in KINDS:
            await self._app(scope, receive, send)
            return
        body = (await receive()).get("body", b"")  # whole: the guard has seen to that
        request = Request(scope, receive)
        asked = sound(KINDS[scope["path"]], request.headers.get("content-type", ""), body)
        if asked is None:
            await self._app(scope, replay(body, receive), send)
            return
        try:
            response = await self._answer(request, asked)
        except Fault as fault:
            response = self._refuse("POST", fault)
        except RequestError as error:
            response = self._refuse("POST", from_request_error(error))
        await response(scope, receive, send)


def sound(
    kind: type[CompletionRequest] | type[ChatRequest], content_type: str, body: bytes
) -> Asked | None:
    """What is asked; None if it is not said as it must be."""
    if content_type.partition(";")[0].strip().lower() != JSON:
        return None
    try:
        return kind.model_validate(json.loads(body))
    except (ValidationError, ValueError):
        return None
