"""Guard: the outermost layer: access, limits on size and time, request ids, the access log.

Pure ASGI: https://asgi.readthedocs.io/en/latest/specs/www.html. The connection under it is in
connection.py.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.log import REQUEST
from baton.server.admission import Bodies, Body
from baton.server.api_error import MESSAGES_PATH, ApiError, response
from baton.server.bodies import MAX_BODY_BYTES, JsonLimits, JsonScan, feed
from baton.server.threads import TENANT

BODY_S = 10.0
"""Time limit for a whole body."""
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
"""Health checks need no key: they reveal nothing about requests."""
PAGE_PATHS = ("/", "/page/", "/favicon.ico")
"""Neither do the page's own files: the page prompts for the key."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
JSON_KIND = re.compile(r"application/[!-~]{1,80}[+]json")
LAST_STATUS = frozenset({401, 408, 413, 431})
"""After these the connection is closed: their clients must not hold it."""
EXPOSED = (
    *("X-Request-Id", "Request-Id", "Retry-After"),
    *(
        f"X-RateLimit-{name}-{of}"
        for name in ("Limit", "Remaining", "Reset")
        for of in ("Requests", "Tokens")
    ),
)
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
        return not self.keys or bool(self._known(scope_headers))

    def _known(self, sent: Headers) -> bytes:
        """The digest of the first key of ours that the headers carry; empty if they carry none."""
        scheme, _, token = sent.get("authorization", "").partition(" ")
        tokens = [token if scheme.lower() == "bearer" else None, sent.get("x-api-key")]
        for given in [_digest(each) for each in tokens if each is not None]:
            if any([hmac.compare_digest(given, key) for key in self.keys]):
                return given
        return b""

    def tenant(self, scope: Scope, sent: Headers) -> str:
        """Who asks, for fair shares: the key, else the client's address. Without keys of the server's own
        an Authorization header proves nothing, and each new one would be a new share."""
        if self.keys:
            return tenant_of(self._known(sent))
        client = scope.get("client")
        return str(client[0]) if client else ""

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
        try:
            return urlsplit(origin).netloc == host
        except ValueError:  # http://[
            return False


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def hashed(keys: Sequence[str]) -> tuple[bytes, ...]:
    """Keys in the form of AccessPolicy.keys."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def tenant_of(digest: bytes) -> str:
    """The tenant that has the key with this digest."""
    return digest.hex()[:16]


def shared_with(app: ASGIApp, policy: AccessPolicy) -> ASGIApp:
    """The application for pages of the policy's origins: answers their preflights, which carry no key,
    and adds to every reply the headers without which a browser hides it from its page."""
    return CORSMiddleware(
        app,
        allow_origins=policy.origins,
        allow_methods=("GET", "POST", "DELETE", "OPTIONS"),
        allow_headers=("*",),
        expose_headers=EXPOSED,
    )


def any_room(path: str, tenant: str) -> None:
    """No request is refused before it is read."""


def answer_to(method: str, path: str, refused: ApiError) -> Response:
    """An error response that nobody counts."""
    return response(refused, path)


class Guard:
    """Wraps the application."""

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        limits: Callable[[str], JsonLimits | None],
        check_room: Callable[[str, str], None] = any_room,
        refuse: Callable[[str, str, ApiError], Response] = answer_to,
    ) -> None:
        """`limits`: of the JSON that a path takes; None for a path that takes none. `check_room` is given
        a path and a tenant, and raises an ApiError if any request of theirs would be refused now.
        `refuse` makes the response from method, path and error."""
        self._app = app
        self._policy = policy
        self._inside = self._answered if not policy.origins else shared_with(self._answered, policy)
        self._limits = limits
        self._check_room, self._refuse = check_room, refuse
        self.bodies = Bodies()
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope)
        request_id = sent.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"], state["tenant"] = request_id, self._policy.tenant(scope, sent)
        REQUEST.set(request_id)
        TENANT.set(state["tenant"])
        if scope["type"] == "websocket":
            await self._websocket(self._refused(scope, sent), scope, receive, send)
            return
        answer = _Response(scope, send, request_id, unread=_has_body(sent))
        state["answer"] = answer
        try:
            if (foreign := self._foreign_host(sent)) is not None:
                await response(foreign, scope["path"])(scope, receive, answer.send)
            else:
                await self._inside(scope, receive, answer.send)
        finally:
            answer.log()

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An HTTP request, but for preflights. `send` adds the headers for pages of other origins."""
        state, sent = scope["state"], Headers(scope=scope)
        answer: _Response = state.pop("answer")
        error = self._refused(scope, sent)
        method, path, tenant = scope["method"], scope["path"], state["tenant"]
        limits = self._limits(path) if method == "POST" else None
        body_ = self.bodies.body(tenant)
        try:
            if error is not None:
                raise error
            whole = bytearray()  # of a path that takes none: it is not read
            if limits is not None:
                scan, room = JsonScan(limits), partial(self._check_room, path, tenant)
                scanned = await _read_whole(whole, body_, sent, receive, scan, self._turn, room)
                answer.unread = False  # so the connection can be used again
                room()
                await feed(scan, bytes(whole[scanned:]), self._turn)
            await self._app(scope, replay(whole, receive, body_.close), send)
        except ApiError as refused:
            if answer.begun:
                raise
            await self._refuse(method, path, refused)(scope, receive, send)
        finally:
            body_.close()

    def _foreign_host(self, sent: Headers) -> ApiError | None:
        host = sent.get("host", "")
        if self._policy.host_allowed(host):
            return None
        return ApiError.bad_request(
            f"host not allowed: {host[:80]!r}; use an address of this server, or start it with "
            "--allowed-host"
        )

    def _refused(self, scope: Scope, sent: Headers) -> ApiError | None:
        if (foreign := self._foreign_host(sent)) is not None:
            return foreign
        host, path = sent.get("host", ""), scope["path"]
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
            state = scope["state"]
            state["body"] = self.bodies.body(state["tenant"])  # of messages: see socket_limits.py
            state["turn"] = self._turn
            await self._app(scope, receive, send)
            return
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", ()):
            await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
            return
        answer = response(error)
        kind = "websocket.http.response"
        start = {"status": error.status, "headers": answer.raw_headers}
        await send({"type": f"{kind}.start"} | start)
        await send({"type": f"{kind}.body", "body": answer.body})


class _Response:
    """The response of one request, as it goes out."""

    def __init__(self, scope: Scope, send: Send, request_id: str, *, unread: bool) -> None:
        self._scope, self._send, self._request_id = scope, send, request_id
        self.unread = unread  # the client may still be sending its body
        self._status = 0
        self._began = time.monotonic()

    async def send(self, message: Message) -> None:
        """Forward, with the request's id in the headers."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            head = MutableHeaders(raw=message.setdefault("headers", []))
            head.setdefault("X-Request-Id", self._request_id)
            if self._scope["path"].startswith(MESSAGES_PATH):
                head["Request-Id"] = head["X-Request-Id"]
            head.setdefault("X-Content-Type-Options", "nosniff")
            if self.unread or self._status in LAST_STATUS:
                head["Connection"] = "close"
        await self._send(message)

    @property
    def begun(self) -> bool:
        return bool(self._status)

    def log(self) -> None:
        """One line for each request, without its content."""
        logger.info(
            "%s %s %s %.3f s",
            self._scope["method"][:20],
            self._scope["path"][:200],
            self._status or "left",
            time.monotonic() - self._began,
        )


def _has_body(sent: Headers) -> bool:
    return sent.get("content-length", "0") != "0" or "transfer-encoding" in sent


async def _read_whole(
    found: bytearray,
    body_: Body,
    sent: Headers,
    receive: Receive,
    scan: JsonScan,
    turn: asyncio.Lock,
    check_room: Callable[[], None],
) -> int:
    """Read the request's body into `found`, within its limits of size and time. Returns how many bytes of
    it are scanned: not the last part, and none while it would be refused anyway. That is decided when all
    is here, not before: until then there may be room. Raises ApiError."""
    if sent.get("content-encoding", "identity").lower() != "identity":
        raise ApiError.bad_request("compressed bodies are not supported: send it uncompressed")
    kind = sent.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not JSON_KIND.fullmatch(kind):
        given = f"not {kind[:80]!r}" if kind else "which is missing"
        raise ApiError.bad_request(f"send JSON, with Content-Type: application/json, {given}")
    length = sent.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise ApiError.too_large(MAX_BODY_BYTES)
    scanned = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError.bad_request("the client left before its request was complete")
                part = message.get("body", b"")
                if len(found) + len(part) > MAX_BODY_BYTES:
                    raise ApiError.too_large(MAX_BODY_BYTES)
                body_.add(len(part))
                found += part
                if not message.get("more_body"):
                    return scanned
                if _has_room(check_room):
                    await feed(scan, bytes(found[scanned:]), turn)
                    scanned = len(found)
    except TimeoutError:
        raise ApiError.slow(BODY_S) from None


def _has_room(check_room: Callable[[], None]) -> bool:
    try:
        check_room()
    except ApiError:
        return False
    return True


def replay(whole: bytearray, receive: Receive, used: Callable[[], None]) -> Receive:
    """A receive() that gives the whole body away, then returns later messages: a disconnect. Who asks for
    those has made its request of the body: `used`."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            used()
            return await receive()
        given = True
        body_ = bytes(whole)
        whole.clear()  # a stream of hours does not keep it
        return {"type": "http.request", "body": body_, "more_body": False}

    return next_message
