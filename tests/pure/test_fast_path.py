"""Requests with a JSON body take the fast path, the others their routes in the framework."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from baton.errors import RequestError
from baton.server.api_error import ApiError
from baton.server.app import FastPath
from baton.server.bodies import INLINE, Path
from baton.server.schema import AnyRequest, ChatRequest, CompletionRequest

VALID = json.dumps({"prompt": "a"}).encode()


def ask(
    body: bytes = VALID, path: str = Path.COMPLETIONS, method: str = "POST"
) -> tuple[str, bytes]:
    """Which path it took, and the body that arrived there."""
    seen: list[tuple[str, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(("long", (await receive())["body"]))

    async def answer(request: Request, payload: AnyRequest) -> Response:
        seen.append(("short", payload.model_dump_json(exclude_unset=True).encode()))
        if payload.model == "fault":
            raise ApiError.not_ready("not yet", 1)
        if payload.model == "error":
            raise RequestError("no")
        return Response()

    def refuse(method: str, path: str, error: ApiError | RequestError) -> Response:
        seen.append((f"refused {method} {type(error).__name__}", str(error).encode()))
        return JSONResponse({}, 400)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    routes: Any = {
        Path.COMPLETIONS: (CompletionRequest, answer), Path.CHAT: (ChatRequest, answer)
    }  # fmt: skip
    asyncio.run(FastPath(app, routes, refuse)(scope, receive, send))
    return seen[-1]


def test_a_valid_request_takes_the_fast_path() -> None:
    assert ask() == ("short", b'{"prompt":"a"}')
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()
    assert ask(chat, Path.CHAT)[0] == "short"
    large = json.dumps({"prompt": "a" * INLINE}).encode()
    assert ask(large)[0] == "short"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b'{"prompt": "a", "n": "1"}', b'"\xff"', b"\xff"]
)
def test_an_invalid_request_is_refused(body: bytes) -> None:
    how, why = ask(body)
    assert how == "refused POST ApiError"
    assert 0 < len(why) <= 300


def test_other_requests_take_their_routes() -> None:
    assert ask(path="/version") == ("long", VALID)
    assert ask(method="PUT") == ("long", VALID)


def test_errors_of_the_fast_path_are_responses() -> None:
    assert ask(json.dumps({"prompt": "a", "model": "fault"}).encode()) == (
        "refused POST ApiError", b"not yet; try again in 1 s",
    )  # fmt: skip
    assert ask(json.dumps({"prompt": "a", "model": "error"}).encode()) == (
        "refused POST RequestError", b"no",
    )  # fmt: skip
