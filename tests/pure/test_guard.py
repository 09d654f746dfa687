"""Access, limits of size and time, and the errors for what exceeds them."""

import asyncio
import json
import socket
from collections.abc import Sequence
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from baton.server.guard import (
    DEEPEST_JSON,
    MAX_BODY_BYTES,
    AccessPolicy,
    Guard,
    TimeoutH11,
    depth_ok,
    hashed,
)

Scope = dict[str, Any]


async def echo(scope: Scope, receive: Any, send: Any) -> None:
    """The application: says how long the body was."""
    body = (await receive()).get("body", b"") if scope["type"] == "http" else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def ask(
    policy: AccessPolicy,
    path: str = "/v1/models",
    *,
    body: Sequence[bytes] = (b"",),
    method: str = "GET",
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of the answer."""
    given_headers = {"host": "localhost:8000"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"",
        "headers": [(k.encode(), v.encode("utf-8", "surrogateescape")) for k, v in given_headers.items()],
    }  # fmt: skip
    parts = list(body)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts) or part == b"..."}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Guard(echo, policy)(scope, receive, send))
    found = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], found, json.loads(content) if content[:1] == b"{" else content


OPEN = AccessPolicy()
LOCKED = AccessPolicy(keys=hashed(["secret", "other"]))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401), ("Bearer secret", 200), ("bearer other", 200), ("Bearer secre", 401),
        ("Bearer secret2", 401), ("Basic secret", 401), ("secret", 401), ("Bearer ", 401),
        ("Bearer " + "x" * 100_000, 401), ("Bearer \udcff", 401),
    ],
)  # fmt: skip
def test_a_key_is_asked_for_and_every_wrong_one_gets_the_same_answer(
    authorization: str | None, status: int
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    found, sent, content = ask(LOCKED, **headers)
    assert found == status
    if status == 401:
        assert sent["www-authenticate"] == "Bearer"
        assert content == ask(LOCKED)[2]
        assert content["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/livez", 200), ("/", 200), ("/page/page.js", 200), ("/metrics", 401),
     ("/timeline", 401), ("/trace.json", 401), ("/v1/completions", 401), ("/docs", 401),
     ("/tokenize", 401), ("/openapi.json", 401), ("/nowhere", 401), ("/health/x", 401)],
)  # fmt: skip
def test_only_what_tells_nothing_of_anybody_is_open(path: str, status: int) -> None:
    assert ask(LOCKED, path)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("LOCALHOST:1", 200),
     ("192.168.1.7:8000", 200), ("[fe80::1]", 200), ("[fe80::1", 400), ("1.2.3.4.evil.example", 400),
     ("evil.example", 400), ("evil.example:8000", 400), ("", 400), ("localhost.evil.example", 400)],
)  # fmt: skip
def test_a_name_that_is_not_ours_is_not_served(host: str, status: int) -> None:
    assert ask(OPEN, host=host)[0] == status
    assert ask(AccessPolicy(hosts=("*",)), host=host)[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:8000", 200), ("https://evil.example", 403), ("null", 403),
     ("http://localhost:9999", 403), ("http://mine.example", 200)],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(origin: str, status: int) -> None:
    assert ask(AccessPolicy(origins=("http://mine.example",)), origin=origin)[0] == status


def test_a_body_may_be_as_large_as_the_limit_and_no_larger() -> None:
    half = b"x" * (MAX_BODY_BYTES // 2)
    assert ask(OPEN, body=[half, half], method="POST")[2] == str(MAX_BODY_BYTES).encode()
    status, headers, content = ask(OPEN, body=[half, half, b"x"], method="POST")
    assert (status, content["error"]["code"]) == (413, "body_too_large")
    assert headers["connection"] == "close"
    told = str(MAX_BODY_BYTES + 1)
    assert ask(OPEN, body=[b"..."], method="POST", content_length=told)[0] == 413


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.guard.BODY_S", 0.05)
    status, _, content = ask(OPEN, body=[b"..."], method="POST")
    assert (status, content["error"]["code"]) == (408, "request_timeout")


def test_what_is_compressed_or_nested_too_deeply_is_refused() -> None:
    assert ask(OPEN, content_encoding="gzip")[0] == 400
    assert ask(OPEN, body=[b"[" * 33 + b"]" * 33], method="POST")[0] == 400
    assert ask(OPEN, body=[b"[" * 32 + b"]" * 32], method="POST")[0] == 200


def test_every_answer_has_an_id_the_clients_own_if_it_is_one() -> None:
    assert ask(OPEN, x_request_id="abc-1")[1]["x-request-id"] == "abc-1"
    for bad in ("", "two words", "x" * 129, "é"):
        found = ask(OPEN, x_request_id=bad)[1]["x-request-id"]
        assert found != bad
        assert len(found) == 16


@given(
    st.recursive(
        st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_depth_is_that_of_brackets_outside_of_strings(value: Any) -> None:
    def depth(each: Any) -> int:
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        nested = max((depth(one) for one in inner), default=0)
        return nested + isinstance(each, dict | list)

    assert depth_ok(json.dumps(value).encode()) == (depth(value) <= DEEPEST_JSON)
    assert depth_ok(json.dumps(value, ensure_ascii=False).encode()) == (
        depth(value) <= DEEPEST_JSON
    )


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nA: b\r\n"]
)
def test_half_a_head_is_not_waited_for(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.guard.HEAD_S", 0.1)

    async def work() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            config = uvicorn.Config(echo, http=TimeoutH11, log_config=None, lifespan="off")
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            rest = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            server.should_exit = True
            await serving
        return rest

    assert asyncio.run(work()) == b""
