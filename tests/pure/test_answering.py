"""The short way to the routes that generate takes what is sound, and only that."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from baton.errors import RequestError
from baton.server.answering import CHAT, COMPLETIONS, Answering, Asked
from baton.server.faults import Fault

SOUND = json.dumps({"prompt": "a"}).encode()


def ask(
    body: bytes = SOUND,
    path: str = COMPLETIONS,
    method: str = "POST",
    kind: str = "application/json",
) -> tuple[str, bytes]:
    """Which way it went, and the body that was seen there."""
    seen: list[tuple[str, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(("long", (await receive())["body"]))

    async def answer(request: Request, asked: Asked) -> Response:
        seen.append(("short", asked.model_dump_json(exclude_unset=True).encode()))
        if asked.model == "fault":
            raise Fault.not_ready("not yet", 1)
        if asked.model == "error":
            raise RequestError("no")
        return Response()

    def refuse(method: str, fault: Fault) -> Response:
        seen.append((f"refused {method} {fault.status}", fault.message.encode()))
        return JSONResponse({}, fault.status)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": method, "path": path, "headers": [(b"content-type", kind.encode())],
    }  # fmt: skip
    asyncio.run(Answering(app, answer, refuse)(scope, receive, send))
    return seen[-1]


def test_what_is_sound_goes_the_short_way() -> None:
    assert ask() == ("short", b'{"prompt":"a"}')
    assert ask(kind="Application/JSON; charset=utf-8")[0] == "short"
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()
    assert ask(chat, CHAT)[0] == "short"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b'{"prompt": "a", "n": "1"}', b'"\xff"', b"\xff"]
)
def test_what_is_wrong_goes_the_long_way_as_it_came(body: bytes) -> None:
    assert ask(body) == ("long", body)


def test_so_does_everything_else() -> None:
    assert ask(path="/tokenize") == ("long", SOUND)
    assert ask(method="PUT") == ("long", SOUND)
    assert ask(kind="text/plain") == ("long", SOUND)


def test_what_cannot_be_answered_is_refused_in_words() -> None:
    assert ask(json.dumps({"prompt": "a", "model": "fault"}).encode()) == (
        "refused POST 503", b"not yet; try again in 1 s",
    )  # fmt: skip
    assert ask(json.dumps({"prompt": "a", "model": "error"}).encode()) == (
        "refused POST 400", b"no",
    )  # fmt: skip
