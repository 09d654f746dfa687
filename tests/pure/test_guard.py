"""Access, limits of size and time, and the errors for what exceeds them."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.datastructures import Headers

from baton.server.admission import ALLOWANCE, Bodies
from baton.server.bodies import MAX_BODY_BYTES, PIECE, limits_of
from baton.server.guard import AccessPolicy, Guard, hashed

Scope = dict[str, Any]


async def echo(scope: Scope, receive: Any, send: Any) -> None:
    """The application: says how long the body was."""
    body = (await receive()).get("body", b"") if scope["type"] == "http" else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def ask(
    policy: AccessPolicy,
    path: str = "",
    *,
    body: Sequence[bytes] = (b"",),
    method: str = "GET",
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of the answer."""
    path = path or ("/v1/completions" if method == "POST" else "/v1/models")
    given_headers = {"host": "localhost:8000", "content-type": "application/json"} | {
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

    guard = Guard(echo, policy, lambda path: limits_of(path, 1024))
    asyncio.run(guard(scope, receive, send))
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
     ("http://localhost:9999", 403), ("http://mine.example", 200),
     ("http://[", 403), ("//]", 403), ("http://[v1.x]:y", 403), ("", 403)],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(origin: str, status: int) -> None:
    assert ask(AccessPolicy(origins=("http://mine.example",)), origin=origin)[0] == status


def test_a_body_may_be_as_large_as_the_limit_and_no_larger() -> None:
    half = b" " * (MAX_BODY_BYTES // 2)
    assert ask(OPEN, body=[half, half], method="POST")[2] == str(MAX_BODY_BYTES).encode()
    status, headers, content = ask(OPEN, body=[half, half, b" "], method="POST")
    assert (status, content["error"]["code"]) == (413, "body_too_large")
    assert headers["connection"] == "close"
    told = str(MAX_BODY_BYTES + 1)
    assert ask(OPEN, body=[b"..."], method="POST", content_length=told)[0] == 413


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.guard.BODY_S", 0.05)
    status, _, content = ask(OPEN, body=[b"..."], method="POST")
    assert (status, content["error"]["code"]) == (408, "request_timeout")


class Upload:
    """A POST under way: its body arrives part by part."""

    def __init__(self, guard: Guard, address: str) -> None:
        self.scope: Scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [
                (b"host", b"localhost"), (b"content-type", b"application/json"),
                (b"transfer-encoding", b"chunked"),
            ],
            "client": (address, 1),
        }  # fmt: skip
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.task = asyncio.ensure_future(guard(self.scope, self.parts.get, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def more(self, size: int, *, last: bool = False) -> int:
        """So many bytes arrive. Returns the status of the answer; 0: there is none yet."""
        self.parts.put_nowait({"type": "http.request", "body": b" " * size, "more_body": not last})
        while not (self.parts.empty() or self.task.done()):
            await asyncio.sleep(0)
        for _ in range(size // PIECE + 3):  # the turns that others get while it is scanned
            await asyncio.sleep(0)
        return self.sent[0]["status"] if self.sent else 0


def test_unfinished_bodies_of_all_clients_together_are_bounded() -> None:
    """And those of one client leave room for others."""
    quarter = MAX_BODY_BYTES // 4

    async def work() -> None:
        guard = Guard(echo, OPEN, lambda path: limits_of(path, 1024))
        guard.bodies = Bodies(9 * quarter, allowance=0)
        held = [Upload(guard, "10.0.0.1") for _ in range(8)]
        assert [await each.more(quarter) for each in held] == [0] * 8
        refused = Upload(guard, "10.0.0.1")
        assert await refused.more(quarter) == 503
        headers = {key.lower(): value for key, value in refused.sent[0]["headers"]}
        assert headers[b"retry-after"]
        assert headers[b"connection"] == b"close"
        assert json.loads(refused.sent[1]["body"])["error"]["code"] == "overloaded"
        other = Upload(guard, "10.0.0.2")
        assert await other.more(quarter, last=True) == 200
        assert await held[0].more(0, last=True) == 200
        held[1].parts.put_nowait({"type": "http.disconnect"})
        assert await held[2].more(MAX_BODY_BYTES) == 413
        held[3].task.cancel()
        await asyncio.wait([each.task for each in held[:4]])
        assert guard.bodies.held == 4 * quarter
        assert await Upload(guard, "10.0.0.1").more(quarter, last=True) == 200
        for each in held[4:]:
            each.task.cancel()
        await asyncio.wait([each.task for each in held[4:]])
        assert guard.bodies.held == 0

    asyncio.run(work())


def test_large_bodies_keep_no_usual_request_out() -> None:
    async def work() -> None:
        guard = Guard(echo, OPEN, lambda path: limits_of(path, 1024))
        guard.bodies = Bodies(MAX_BODY_BYTES)
        large = [Upload(guard, "10.0.0.1") for _ in range(8)]
        statuses = [await each.more(MAX_BODY_BYTES // 2) for each in large]
        assert statuses == [0, 0, *[503] * 6]
        for size, status in ((ALLOWANCE, 200), (MAX_BODY_BYTES // 2, 503)):
            assert await Upload(guard, "10.0.0.1").more(size, last=True) == status
        for each in large[:2]:
            each.task.cancel()
        await asyncio.wait([each.task for each in large])
        assert guard.bodies.held == 0

    asyncio.run(work())


def test_a_body_counts_until_its_request_has_been_made() -> None:
    """Not for the hours that a stream may take, nor does anything keep it so long."""

    async def work() -> None:
        steps: list[int] = []

        async def stream(scope: Scope, receive: Any, send: Any) -> None:
            await receive()
            steps.append(guard.bodies.held)
            waiting = asyncio.ensure_future(receive())  # for the client to leave
            await asyncio.sleep(0)
            steps.append(guard.bodies.held)
            waiting.cancel()
            await echo(scope, asyncio.Queue[dict[str, Any]]().get, send)

        guard = Guard(stream, OPEN, lambda path: limits_of(path, 1024))
        guard.bodies = Bodies(allowance=0)
        upload = Upload(guard, "10.0.0.1")
        await upload.more(1000, last=True)
        assert steps == [1000, 0]
        upload.task.cancel()
        await asyncio.wait([upload.task])
        assert guard.bodies.held == 0

    asyncio.run(work())


def test_what_is_compressed_or_nested_too_deeply_is_refused() -> None:
    assert ask(OPEN, method="POST", content_encoding="gzip")[0] == 400
    assert ask(OPEN, body=[b"[" * 33 + b"]" * 33], method="POST")[0] == 400
    assert ask(OPEN, body=[b"[" * 32 + b"]" * 32], method="POST")[0] == 200


def test_every_answer_has_an_id_the_clients_own_if_it_is_one() -> None:
    assert ask(OPEN, x_request_id="abc-1")[1]["x-request-id"] == "abc-1"
    for bad in ("", "two words", "x" * 129, "é"):
        found = ask(OPEN, x_request_id=bad)[1]["x-request-id"]
        assert found != bad
        assert len(found) == 16


def test_a_body_is_json_and_only_where_one_is_read() -> None:
    for kind, status in (
        ("application/json; charset=utf-8", 200), ("Application/JSON", 200),
        ("application/vnd.api+json", 200), ("text/plain", 400), ("", 400),
        ("application/x-www-form-urlencoded", 400), ("application/jsonx", 400),
    ):  # fmt: skip
        assert ask(OPEN, method="POST", body=[b"{}"], content_type=kind)[0] == status
    for method, path in (("GET", "/v1/completions"), ("POST", "/nowhere"), ("DELETE", "/metrics")):
        status, headers, seen = ask(OPEN, path, method=method, body=[b"..."], content_length="9")
        assert (status, seen) == (200, b"0"), "the application was given a body"
        assert headers["connection"] == "close"


@pytest.mark.parametrize(
    ("more", "status", "closes"),
    [({}, 200, False), ({"authorization": "Bearer x"}, 401, True), ({"host": "x"}, 400, False),
     ({"host": "x", "content_length": "5"}, 400, True), ({"transfer_encoding": "chunked"}, 200, True)],
)  # fmt: skip
def test_a_connection_ends_where_its_client_may_still_be_sending(
    more: dict[str, str], status: int, closes: bool
) -> None:
    found, headers, _ = ask(LOCKED, **{"authorization": "Bearer secret"} | more)
    assert (found, headers.get("connection") == "close") == (status, closes)


def tenant(policy: AccessPolicy, key: str, address: str) -> str:
    scope = {"type": "http", "client": (address, 1)}
    return policy.tenant(scope, Headers({"authorization": f"Bearer {key}"}))


def test_shares_go_by_key_else_by_address() -> None:
    assert tenant(LOCKED, "secret", "10.0.0.1") == tenant(LOCKED, "secret", "10.0.0.2")
    assert tenant(LOCKED, "secret", "10.0.0.1") != tenant(LOCKED, "other", "10.0.0.1")
    assert "secret" not in tenant(LOCKED, "secret", "10.0.0.1")
    # Where no key is asked for, a made-up one is no share of its own.
    assert tenant(OPEN, "a", "10.0.0.1") == tenant(OPEN, "b", "10.0.0.1") == "10.0.0.1"


def test_a_websocket_without_the_key_is_refused_with_the_same_status() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "websocket", "path": "/v1/stream", "headers": [(b"host", b"localhost")],
        "extensions": {"websocket.http.response": {}},
    }  # fmt: skip
    guard = Guard(echo, LOCKED, lambda path: limits_of(path, 1024))
    asyncio.run(guard(scope, receive, send))
    assert [each["type"].rpartition(".")[2] for each in sent] == ["start", "body"]
    assert sent[0]["status"] == 401
    assert json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"
