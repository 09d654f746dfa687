"""All routes of the application: who is let in, and what odd names reach."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute

from baton.client.aio import Queue
from baton.client.tracker import PendingRequest
from baton.server.app import PAGE
from baton.wire.messages import Submit
from tests.pure.town_app import TownClient, serving

OPEN = {"/health", "/livez", "/readyz", "/ping", "/", "/page/{name}"}
"""Need no key."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")
WRONG = (
    {}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer secre"},
    {"authorization": "Bearer secret2"}, {"authorization": "secret"}, {"authorization": "Basic secret"},
    {"authorization": "Bearer " + "k" * 100_000}, {"x-api-key": "secre"}, {"api-key": "secret"},
)  # fmt: skip


def framework(client: TownClient) -> FastAPI:
    """Behind the guard."""
    app = client.app._app  # type: ignore[attr-defined]
    assert isinstance(app, FastAPI)
    return app


def test_every_route_but_the_open_ones_needs_the_key() -> None:
    async def work() -> None:
        async with serving(api_keys=("secret",)) as client:
            routes = framework(client).routes
            paths = {route.path for route in routes if hasattr(route, "path")}
            assert {"/metrics", "/openapi.json", "/v1/stream", "/timeline", "/tokenize"} <= paths
            assert paths >= OPEN
            concrete = {
                each: each.replace("{name:path}", "demo").replace("{name}", "x") for each in paths
            }
            unknown = {
                each: each for each in ("/nowhere", "/v1", "/docs/", "/health/", "//", "/admin")
            }
            for path, asked in (concrete | unknown).items():
                for method in METHODS:
                    for given in WRONG if method in ("GET", "POST") else WRONG[:2]:
                        answer = await client.ask(asked, method=method, headers=given)
                        if path not in OPEN:
                            assert answer.status == 401, (method, asked, given)
                            assert answer.headers["connection"] == "close"
                        else:
                            assert answer.status != 401, (method, asked)
            assert any(isinstance(each, APIWebSocketRoute) for each in routes)
            assert any(isinstance(each, APIRoute) for each in routes)

    asyncio.run(work())


def test_answers_are_what_the_description_says() -> None:
    """Their status and kind of content, whole, streamed and wrong."""

    async def work() -> None:
        async with serving() as client:
            paths = (await client.ask("/openapi.json")).json["paths"]
            assert "/metrics" in paths

            async def check(method: str, path: str, body: Any = None, submits: int = 0) -> int:
                asked = path.replace("{name}", "x")
                answer = await client.ask(asked, body, method=method.upper(), submits=submits)
                responses = paths[path][method]["responses"]
                found = responses.get(str(answer.status), responses["default"])
                kind = answer.headers.get("content-type", "").partition(";")[0]
                assert kind in found.get("content", {}) or not answer.body, (method, path, kind)
                return answer.status

            for path, methods in paths.items():
                assert not any("422" in each["responses"] for each in methods.values())
                for method in methods:
                    if path != "/timeline":  # it never ends
                        assert await check(method, path, {} if method == "post" else None) < 500
            completion: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
            chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
            response = {"input": "Hi", "max_output_tokens": 2}
            for path, body in (
                ("/v1/completions", completion), ("/v1/chat/completions", chat),
                ("/v1/messages", chat), ("/v1/responses", response),
            ):  # fmt: skip
                for stream in (False, True):
                    assert await check("post", path, body | {"stream": stream}, 1) == 200
            timeline = paths["/timeline"]["get"]["responses"]["200"]["content"]
            assert list(timeline) == ["text/event-stream"]

    asyncio.run(work())


async def shake_hands(client: TownClient, **headers: str) -> str:
    """What the first message of a WebSocket is answered with."""
    sent: list[dict[str, Any]] = []
    asked = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}]

    async def receive() -> dict[str, Any]:
        return asked.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = {"host": "localhost"} | headers
    scope = {
        "type": "websocket", "path": "/v1/stream", "query_string": b"api_key=secret", "subprotocols": [],
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        "extensions": {"websocket.http.response": {}}, "asgi": {"version": "3.0"}, "root_path": "",
        "scheme": "ws", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    await client.app(scope, receive, send)
    return f"{sent[0]['type']} {sent[0].get('status', '')}".strip()


def test_so_does_the_websocket() -> None:
    async def work() -> None:
        async with serving(api_keys=("secret",)) as client:
            for given in WRONG:
                assert await shake_hands(client, **given) == "websocket.http.response.start 401"
            good = {"authorization": "Bearer secret"}
            assert await shake_hands(client, **good) == "websocket.accept"
            evil = {"origin": "https://evil.example"}
            assert await shake_hands(client, **good | evil) == "websocket.http.response.start 403"

    asyncio.run(work())


NAMES = [
    "x" * 300, "x" * 5000, "a\0b", "..", "../app.py", "..%2fapp.py", "%2e%2e", "../../../etc/passwd",
    "/etc/passwd", ".", "", "index.html\0", "index.html/..", "INDEX.HTML", "\udcff",
    "a\nb", "~", "page.css ", "\N{SNOWMAN}" * 200, "__pycache__", "%00", "..\\app.py",
]  # fmt: skip


@pytest.mark.parametrize("folder", ["/page/", "/v1/models/", "/"])
def test_a_name_that_is_none_of_ours_is_not_found(folder: str) -> None:
    async def work() -> None:
        async with serving() as client:
            for name in filter(None, NAMES):
                answer = await client.ask(folder + name)
                assert answer.status == 404, (folder, name)
                assert answer.json["error"]["code"] in ("not_found", "model_not_found")
                assert len(answer.body) < 3000
                assert str(PAGE.parent).encode() not in answer.body

    asyncio.run(work())


def test_the_page_is_served() -> None:
    async def work() -> None:
        async with serving() as client:
            for file in PAGE.iterdir():
                answer = await client.ask(f"/page/{file.name}")
                assert (answer.status, answer.body) == (200, file.read_bytes())
                assert answer.headers["content-type"].partition(";")[0] in (
                    "text/html", "text/css", "text/javascript", "image/svg+xml",
                )  # fmt: skip
            assert (await client.ask("/")).body == (PAGE / "index.html").read_bytes()

    asyncio.run(work())


def test_places_are_given_back_whatever_sending_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three choices cannot be sent."""

    async def work() -> None:
        async with serving() as client:
            router, sent = client.service.router, []
            submit = router.submit

            def failing(request: Submit, queue: Queue) -> PendingRequest:
                sent.append(request)
                if len(sent) == 2:
                    raise OSError("no memory")
                return submit(request, queue)

            monkeypatch.setattr(router, "submit", failing)
            with pytest.raises(OSError, match="no memory"):
                await client.ask("/v1/completions", {"prompt": "a", "n": 3})
            admission = client.service.admission
            assert (admission.waiting, admission.in_lines, len(router)) == (0, 0, 0)

    asyncio.run(work())
