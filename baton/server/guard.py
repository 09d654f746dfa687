"""Guard: what every request passes before the application sees it, and what it may cost.

Pure ASGI, outermost: who may ask (key, host, origin), how much may be sent and how slowly, an id for
each request, and a log line for each answer. https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.log import REQUEST
from baton.server.faults import Fault, body, headers
from baton.server.fields import DEEPEST_JSON, depth_ok

MAX_BODY_BYTES = 4 << 20
BODY_S = 10.0
"""A body must have come within so long."""
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
"""Need no key: they say nothing of anybody's requests."""
PAGE_PATHS = ("/", "/page/", "/favicon.ico")
"""The page itself holds no secret; it asks for the key."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REQUEST_ID = re.compile(r"[!-~]{1,128}")

logger = logging.getLogger("server.access")


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may ask."""

    keys: tuple[bytes, ...] = ()  # sha256 of each; none: everybody
    hosts: tuple[str, ...] = LOOPBACK  # names this server answers to; "*": any
    origins: tuple[str, ...] = ()  # pages of other sites that may ask; "*": any

    def lets_in(self, scope_headers: Headers) -> bool:
        """Has it one of the keys? Takes the same time for every wrong one."""
        if not self.keys:
            return True
        scheme, _, token = scope_headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = [hmac.compare_digest(given, key) for key in self.keys]
        return scheme.lower() == "bearer" and any(found)

    def knows_host(self, host: str) -> bool:
        """A browser that was led here under another name (DNS rebinding) is not served. An address
        is no name: nobody can make it lead elsewhere."""
        if "*" in self.hosts:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or _is_address(name)

    def welcomes(self, origin: str | None, host: str) -> bool:
        """Pages of this server and of those named; what is no browser has no origin."""
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
    """Keys as they are kept."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class Guard:
    """Around the application."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        request_id = asked.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST.set(request_id)
        fault = self._refused(scope, asked)
        if scope["type"] == "websocket":
            await self._websocket(fault, scope, receive, send)
            return
        answer = _Answer(scope, send, request_id)
        try:
            if fault is not None:
                raise fault
            body_ = await _whole_body(asked, receive)
            if not depth_ok(body_):
                raise Fault.bad_request(f"the JSON is nested more than {DEEPEST_JSON} deep")
            await self._app(scope, replay(body_, receive), answer.send)
        except Fault as refused:
            await answer.fault(refused)
        finally:
            answer.log()

    def _refused(self, scope: Scope, asked: Headers) -> Fault | None:
        host, path = asked.get("host", ""), scope["path"]
        if not self._rules.knows_host(host):
            return Fault.bad_request(
                f"this server does not go by the name {host[:80]!r}: ask it by an address it was "
                "started with, or start it with --allowed-host"
            )
        if not self._rules.welcomes(asked.get("origin"), host):
            return Fault.forbidden(
                f"pages of {asked['origin'][:80]!r} may not ask this server; start it with "
                "--allowed-origin if they shall"
            )
        free = path in OPEN_PATHS or path in PAGE_PATHS or path.startswith("/page/")
        return None if free or self._rules.lets_in(asked) else Fault.wrong_key()

    async def _websocket(
        self, fault: Fault | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if fault is None:
            await self._app(scope, receive, send)
            return
        await receive()  # websocket.connect
        await send({"type": "websocket.close", "code": 1008, "reason": fault.message[:100]})


class _Answer:
    """The response of one request, as it goes out."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope, self._send, self._request_id = scope, send, request_id
        self._status = 0
        self._began = time.monotonic()

    async def send(self, message: Message) -> None:
        """Passes on, with the request's id in the head."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            sent = MutableHeaders(raw=message.setdefault("headers", []))
            sent.setdefault("X-Request-Id", self._request_id)
            sent.setdefault("X-Content-Type-Options", "nosniff")
        await self._send(message)

    async def fault(self, fault: Fault) -> None:
        """Instead of the application's answer, if there is none yet."""
        if self._status:
            raise fault
        content = json.dumps(body(fault)).encode()
        raw = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        raw += [(k.lower().encode(), v.encode()) for k, v in headers(fault).items()]
        if fault.status == 413:
            raw.append((b"connection", b"close"))  # what else of the body is on its way is not read
        head = {"type": "http.response.start", "status": fault.status, "headers": raw}
        await self.send(head)
        await self._send({"type": "http.response.body", "body": content})

    def log(self) -> None:
        """One line for each request; of what was asked, the path alone."""
        logger.info(
            "%s %s %s %.3f s",
            self._scope["method"],
            self._scope["path"][:200],
            self._status or "left",
            time.monotonic() - self._began,
        )


async def _whole_body(asked: Headers, receive: Receive) -> bytes:
    """The request's body, within its limits of size and time. Raises Fault."""
    if asked.get("content-encoding", "identity").lower() != "identity":
        raise Fault.bad_request("compressed bodies are not taken: send it as it is")
    length = asked.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise Fault.too_large(MAX_BODY_BYTES)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Fault.bad_request("the client left before its request was whole")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY_BYTES:
                    raise Fault.too_large(MAX_BODY_BYTES)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Fault.slow(BODY_S) from None


def replay(body_: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever else comes: a client that leaves."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body_, "more_body": False}

    return next_message
