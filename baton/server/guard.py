"""Guard: the outermost layer: access, limits on size and time, request ids, the access log.

Pure ASGI (https://asgi.readthedocs.io/en/latest/specs/www.html), but for the time limit on a request's
head, which is part of the HTTP protocol under it.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from baton.log import REQUEST
from baton.server.api_error import ApiError, response

MAX_BODY_BYTES = 4 << 20
BODY_S = 10.0
"""Time limit for a body."""
HEAD_S = 10.0
DEEPEST_JSON = 32
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
"""Health checks need no key: they reveal nothing about requests."""
PAGE_PATHS = ("/", "/page/", "/favicon.ico")
"""Neither do the page's own files: the page prompts for the key."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STRING = re.compile(
    rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL
)  # the last may be unterminated
ONE_KIND = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
PAIR = b"[]"
REQUEST_ID = re.compile(r"[!-~]{1,128}")

logger = logging.getLogger("server.access")


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Which requests are accepted: by key, host name and origin."""

    keys: tuple[bytes, ...] = ()  # sha256 of each; empty: no key needed
    hosts: tuple[str, ...] = LOOPBACK  # host names of this server; "*": any
    origins: tuple[str, ...] = ()  # origins of other web pages; "*": any

    def authorized(self, scope_headers: Headers) -> bool:
        """Do the headers carry one of the keys? Compares in constant time."""
        if not self.keys:
            return True
        scheme, _, token = scope_headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = [hmac.compare_digest(given, key) for key in self.keys]
        return scheme.lower() == "bearer" and any(found)

    def host_allowed(self, host: str) -> bool:
        """Unknown names are refused, so that a web page cannot reach this server by DNS rebinding.
        Addresses are allowed: they cannot be rebound."""
        if "*" in self.hosts:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or _is_address(name)

    def origin_allowed(self, origin: str | None, host: str) -> bool:
        """Pages of this server and of `origins`; clients other than browsers send no origin."""
        if origin is None or "*" in self.origins or origin in self.origins:
            return True
        return urlsplit(origin).netloc == host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def hashed(keys: Sequence[str]) -> tuple[bytes, ...]:
    """Keys in the form of AccessPolicy.keys."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope)
        request_id = sent.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST.set(request_id)
        error = self._refused(scope, sent)
        if scope["type"] == "websocket":
            await self._websocket(error, scope, receive, send)
            return
        answer = _Response(scope, send, request_id)
        try:
            if error is not None:
                raise error
            body_ = await _whole_body(sent, receive)
            if not depth_ok(body_):
                raise ApiError.bad_request(f"the JSON is nested more than {DEEPEST_JSON} deep")
            await self._app(scope, replay(body_, receive), answer.send)
        except ApiError as refused:
            await answer.error(refused, receive)
        finally:
            answer.log()

    def _refused(self, scope: Scope, sent: Headers) -> ApiError | None:
        host, path = sent.get("host", ""), scope["path"]
        if not self._policy.host_allowed(host):
            return ApiError.bad_request(
                f"host not allowed: {host[:80]!r}; use an address of this server, or start it with "
                "--allowed-host"
            )
        if not self._policy.origin_allowed(sent.get("origin"), host):
            return ApiError.forbidden(
                f"origin not allowed: {sent['origin'][:80]!r}; to allow it, start the server with "
                "--allowed-origin"
            )
        free = path in OPEN_PATHS or path in PAGE_PATHS or path.startswith("/page/")
        return None if free or self._policy.authorized(sent) else ApiError.wrong_key()

    async def _websocket(
        self, error: ApiError | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if error is None:
            await self._app(scope, receive, send)
            return
        await receive()  # websocket.connect
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})


class _Response:
    """The response of one request, as it goes out."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope, self._send, self._request_id = scope, send, request_id
        self._status = 0
        self._began = time.monotonic()

    async def send(self, message: Message) -> None:
        """Forward, with the request's id in the headers."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            head = MutableHeaders(raw=message.setdefault("headers", []))
            head.setdefault("X-Request-Id", self._request_id)
            head.setdefault("X-Content-Type-Options", "nosniff")
        await self._send(message)

    async def error(self, error: ApiError, receive: Receive) -> None:
        """Send an error response, if the application has not begun its own."""
        if self._status:
            raise error
        await response(error)(self._scope, receive, self.send)

    def log(self) -> None:
        """One line for each request, without its content."""
        logger.info(
            "%s %s %s %.3f s",
            self._scope["method"],
            self._scope["path"][:200],
            self._status or "left",
            time.monotonic() - self._began,
        )


async def _whole_body(sent: Headers, receive: Receive) -> bytes:
    """The request's body, within its limits of size and time. Raises ApiError."""
    if sent.get("content-encoding", "identity").lower() != "identity":
        raise ApiError.bad_request("compressed bodies are not supported: send it uncompressed")
    length = sent.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise ApiError.too_large(MAX_BODY_BYTES)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError.bad_request("the client left before its request was complete")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY_BYTES:
                    raise ApiError.too_large(MAX_BODY_BYTES)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError.slow(BODY_S) from None


def replay(body_: bytes, receive: Receive) -> Receive:
    """A receive() that returns the whole body, then later messages: a disconnect."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body_, "more_body": False}

    return next_message


def depth_ok(data: bytes) -> bool:
    """Is this JSON nested at most DEEPEST_JSON deep? Removes strings, then the innermost pairs of
    brackets, a level at a time. Invalid JSON is rejected later by the parser."""
    if data.count(b"[") + data.count(b"{") <= DEEPEST_JSON:
        return True
    left = STRING.sub(b"", data).translate(ONE_KIND, NO_BRACKETS)
    for _ in range(DEEPEST_JSON):
        if PAIR not in left:
            break
        left = left.replace(PAIR, b"")
    return PAIR not in left and left.count(b"[") <= DEEPEST_JSON


class TimeoutH11(H11Protocol):
    """Closes connections that do not send the head of a request within HEAD_S. uvicorn's own timer runs
    between requests only, and does not end half a head ("slowloris")."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.conn.their_state is h11.IDLE
        if waits and self._head_timer is None:  # the next request on this connection has begun
            self._start_timer()
        elif not waits:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._too_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
