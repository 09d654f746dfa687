"""Fast path: valid requests to the two routes that generate do not pass through the web framework.

Its routing, body parsing, dependencies and middleware take as much CPU as all the rest of a request.
Everything else, invalid requests above all, takes the same routes in app.py, which report errors.
"""

import json
from collections.abc import Awaitable, Callable, Mapping

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.errors import RequestError
from baton.server.api_error import ApiError, from_request_error
from baton.server.guard import replay
from baton.server.schema import AnyRequest, ChatRequest, CompletionRequest

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
KINDS: Mapping[str, type[CompletionRequest] | type[ChatRequest]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatRequest,
}
JSON = "application/json"


class FastPath:
    """Pure ASGI, between the guard and the framework."""

    def __init__(
        self,
        app: ASGIApp,
        answer: Callable[[Request, AnyRequest], Awaitable[Response]],
        refuse: Callable[[str, ApiError], Response],
    ) -> None:
        self._app = app
        self._answer = answer
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in KINDS:
            await self._app(scope, receive, send)
            return
        body = (await receive()).get("body", b"")  # complete: see guard.py
        request = Request(scope, receive)
        payload = valid(KINDS[scope["path"]], request.headers.get("content-type", ""), body)
        if payload is None:
            await self._app(scope, replay(body, receive), send)
            return
        try:
            response = await self._answer(request, payload)
        except ApiError as error:
            response = self._refuse("POST", error)
        except RequestError as error:
            response = self._refuse("POST", from_request_error(error))
        await response(scope, receive, send)


def valid(
    kind: type[CompletionRequest] | type[ChatRequest], content_type: str, body: bytes
) -> AnyRequest | None:
    """The request; None if the body is not a valid one."""
    if content_type.partition(";")[0].strip().lower() != JSON:
        return None
    try:
        return kind.model_validate(json.loads(body))
    except (ValidationError, ValueError):
        return None
