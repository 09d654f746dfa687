"""A real server socket in this process over a small application: what tests of connections share."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from baton.clock import Clock, monotonic
from baton.server.accept import Acceptor
from baton.server.bodies import limits_of
from baton.server.connection import ServerProtocol
from baton.server.crowd import CONNECTIONS, Crowd
from baton.server.guard import AccessPolicy, Guard, hashed
from baton.server.options import ServerSettings
from baton.server.run import configured
from tests.patience import PATIENCE_S

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
KEY = b"Authorization: Bearer k\r\n"


class App:
    """Answers at once with what it was sent; /flood never stops sending, /big sends it all at once."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.asked: list[str] = []
        self.tenants: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        self.tenants.add(scope["state"]["tenant"])
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": str(len(message["text"]))})
            return
        body = (await receive()).get("body", b"")
        start = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        part = {"type": "http.response.body", "body": b"x" * 60_000, "more_body": True}
        if scope["path"] == "/flood":
            pump = asyncio.create_task(self.pump(send, part))
            while (await receive())["type"] != "http.disconnect":
                pass
            pump.cancel()
            self.ended.set()
        elif scope["path"] == "/big":
            await send(part | {"body": b"x" * 20_000_000, "more_body": False})
        else:
            await send({"type": "http.response.body", "body": str(len(body)).encode()})

    async def pump(self, send: Any, part: Any) -> None:
        while True:
            await send(part)
            await asyncio.sleep(0)


class Served:
    """A server in this process."""

    def __init__(self, port: int, app: App, guard: Guard, server: uvicorn.Server) -> None:
        self.port, self.app, self.guard, self.server = port, app, guard, server

    async def open(self, *sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for part in sent:
            writer.write(part)
        return reader, writer

    async def ask(self, *sent: bytes) -> bytes:
        """All that comes until the server ends the connection."""
        reader, writer = await self.open(*sent)
        try:
            return await asyncio.wait_for(reader.read(), PATIENCE_S)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    *keys: str,
    certificate: Path | None = None,
    connections: int = CONNECTIONS,
    clock: Clock = monotonic,
) -> AsyncIterator[Served]:
    """`certificate`: of https, with its private key in the same file. `clock`: of connections' ages."""
    app = App()
    guard = Guard(app, AccessPolicy(hashed(keys)), lambda path: limits_of(path, 2048))
    settings = ServerSettings("ipc:///nowhere", "demo", certificate=certificate)
    config = configured(guard, settings)
    config.lifespan, config.timeout_keep_alive = "off", 0.2  # type: ignore[assignment]
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        serving = asyncio.create_task(server.serve(sockets=[]))
        while not server.started:
            await asyncio.sleep(0.01)
        acceptor = Acceptor(
            listener,
            partial(
                ServerProtocol,
                config,
                server.server_state,
                server.lifespan.state,
                crowd=Crowd(connections, clock=clock),
            ),
            config.ssl,
        )
        try:
            yield Served(listener.getsockname()[1], app, guard, server)
        finally:
            acceptor.close()
            server.should_exit = server.force_exit = True
            await serving
            await acceptor.wait_closed()


def answered(sent: bytes, status: int, code: str, name: str = "") -> dict[str, str]:
    """Checks an error response; its headers. `name`: of the case, for who reads that it failed."""
    head, _, body = sent.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.startswith(f"HTTP/1.1 {status} "), (name, sent[:300])
    assert json.loads(body)["error"]["code"] == code, name
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    assert headers["connection"] == "close", name
    return headers
