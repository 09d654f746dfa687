"""Run: the server's process, from the bound port to the last answer.

The port is bound before anything is loaded, so one that is taken is known at once. SIGTERM and SIGINT
drain: nothing new is taken, what runs may end within --shutdown-timeout, the rest is told that it will
not; a second signal ends it now.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from baton.client.aio import RouterClient
from baton.host import process_runs
from baton.model_files import resolve_model
from baton.package import own_version
from baton.server.app import make_app
from baton.server.binding import adopt, bind
from baton.server.desk import Desk
from baton.server.h11 import PatientH11
from baton.server.metrics import Metrics
from baton.server.settings import ServerSettings
from baton.server.spans import exporting_to
from baton.server.talk import Talk
from baton.server.templates import Renderer, read_template
from baton.server.watch import Watch
from baton.wire.keys import load_keys

REFRESH_S = 0.5
CONNECTIONS = 2048
GRACE_S = 2
"""For the last words of requests that were cut off, and for pages that watch."""

logger = logging.getLogger(__name__)


def serve(settings: ServerSettings) -> int:
    """Until a signal. Returns the exit code; raises a BatonError for what cannot work."""
    listener = bind(settings.host, settings.port) if settings.fd is None else adopt(settings.fd)
    try:
        return asyncio.run(_serve(settings, listener))
    finally:
        listener.close()


async def _serve(settings: ServerSettings, listener: socket.socket) -> int:
    files = resolve_model(settings.model)
    keys = load_keys(settings.keys) if settings.keys else None
    line = RouterClient(settings.router, keys=keys)
    desk = Desk(settings, files, line)
    metrics = Metrics(desk.names[0])
    otlp = settings.otlp_endpoint
    watch = Watch(line, metrics, exporting_to(otlp, desk.names[0]) if otlp else None)
    template = read_template(files.folder, settings.chat_template)
    renderer = Renderer(template) if template else None

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        line.connect(watch.observed)
        refreshing = asyncio.create_task(_refresh(watch, desk))
        try:
            yield
        finally:
            refreshing.cancel()
            line.close()
            if renderer is not None:
                await renderer.close()

    app = make_app(desk, watch, Talk(desk, renderer), lifespan, own_version())
    config = uvicorn.Config(
        app,
        http=PatientH11,
        ws="websockets-sansio",
        loop="asyncio",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE_S,
        ws_max_size=4 << 20,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = _Server(config)
    loop = asyncio.get_running_loop()
    drain = _Drain(server, desk)
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, drain.begin)
    watching = loop.create_task(_mind_parent(settings.parent, drain))
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
    return 0


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Drain:
    """The way out."""

    def __init__(self, server: uvicorn.Server, desk: Desk) -> None:
        self._server, self._desk = server, desk
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The first time in order, the second time at once."""
        if self._task is not None:
            self._server.should_exit = True
            self._desk.line.fail_all("shutting_down", "the server was stopped")
            return
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        desk, patience = self._desk, self._desk.settings.shutdown_s
        desk.draining = True
        logger.info("shutting down: %d requests are under way", len(desk.line))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while len(desk.line):
                    await asyncio.sleep(0.05)
        cut = len(desk.line)
        if cut:
            logger.warning("%d requests did not end within %g s and are cut off", cut, patience)
            desk.line.fail_all("shutting_down", "the server is shutting down")
        self._server.should_exit = True  # after GRACE_S for pages that watch, and who does not read


async def _refresh(watch: Watch, desk: Desk) -> None:
    while True:
        watch.refresh()
        desk.look()
        await asyncio.sleep(REFRESH_S)


async def _mind_parent(parent: int | None, drain: _Drain) -> None:
    """A server whose supervisor is gone ends too."""
    if parent is None:
        return
    while process_runs(parent):
        await asyncio.sleep(1.0)
    os._exit(0)
