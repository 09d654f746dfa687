"""Run: the server's process, from the bound port to the last response.

SIGTERM and SIGINT drain: new requests are rejected, running ones may finish within --shutdown-timeout,
the rest end with an error. A second signal ends them now.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from baton.client.aio import RouterClient
from baton.host import process_runs, release_memory
from baton.model_files import ModelFiles, resolve_model
from baton.package import own_version
from baton.pulse import EVERY_S, Pulse
from baton.server.accept import Acceptor, spare_descriptors
from baton.server.app import make_app
from baton.server.bodies import MAX_BODY_BYTES
from baton.server.connection import ServerProtocol
from baton.server.crowd import Crowd, places
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.server.options import ServerSettings, adopt, bind
from baton.server.otel import Spans, exporting_to
from baton.server.service import GenerationService
from baton.server.socket_limits import StrictWebSocket
from baton.server.templates import ProcessRenderer, Renderer, ThreadRenderer, read_template
from baton.server.threads import FairThreads
from baton.wire.keys import load_keys

REFRESH_S = 0.5
TIDY_S = 5.0
"""Between two full collections. Ended requests leave cycles: thousands of objects in a few seconds of a
burst. Python would collect them once they are a quarter of all objects; the heap has grown by then."""
GRACE_S = 2
"""For the last events of interrupted requests and of open pages."""
REPORTS_S = 2.0
"""For the router's events of requests that were answered, where they are traced."""
EXPORT_S = 2.0
"""For a collector to take them."""

logger = logging.getLogger(__name__)


def serve(settings: ServerSettings) -> int:
    """Serve until a signal. Returns the exit code. Raises BatonError."""
    listener = bind(settings.host, settings.port) if settings.fd is None else adopt(settings.fd)
    try:
        return asyncio.run(_serve(settings, listener))
    finally:
        listener.close()


async def _serve(settings: ServerSettings, listener: socket.socket) -> int:
    asyncio.get_running_loop().set_default_executor(FairThreads())
    files = resolve_model(settings.model)
    keys = load_keys(settings.keys) if settings.keys else None
    router = RouterClient(settings.router, keys=keys)
    renderer = _renderer(settings, files)
    service = GenerationService(settings, files, router, renderer)
    metrics = Metrics(service.names[0], settings.metrics_prefix)
    otlp = settings.otlp_endpoint
    spans = exporting_to(otlp, service.names[0]) if otlp else None
    monitor = Monitor(router, metrics, spans)
    hurry = asyncio.Event()

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        router.connect(monitor.observed, monitor.ended_alone)
        refreshing = asyncio.create_task(_refresh(monitor, service))
        try:
            yield
        finally:
            if spans is not None:
                await unless(hurry, _last_spans(spans, router))
            refreshing.cancel()
            router.close()
            if renderer is not None:
                await renderer.close()

    app = make_app(service, monitor, lifespan, own_version())
    config = configured(app, settings)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = _Server(config, service, hurry)
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, server.drain)
    beside = []
    if settings.parent is not None:
        beside.append(loop.create_task(_watch_parent(settings.parent)))
    if settings.pulse is not None:
        beside.append(loop.create_task(_beat(Pulse(settings.pulse))))
    await server.serve(sockets=[listener])
    for task in beside:
        task.cancel()
    return 0


def configured(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """How connections are served."""
    return uvicorn.Config(
        app,
        http=ServerProtocol,
        ws=StrictWebSocket,
        loop="asyncio",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # a client could write any address there, and have a share for each
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE_S,
        ws_max_size=MAX_BODY_BYTES,
        ws_per_message_deflate=False,  # 4 MiB could come as 4 KiB
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )


def _renderer(settings: ServerSettings, files: ModelFiles) -> Renderer | None:
    template = read_template(files.folder, settings.chat_template)
    if template is None:
        return None
    return ProcessRenderer(template) if settings.chat_template else ThreadRenderer(template)


class _Server(uvicorn.Server):
    """Drains at the first signal. A second one ends it now; `hurry` is set then."""

    def __init__(
        self, config: uvicorn.Config, service: GenerationService, hurry: asyncio.Event
    ) -> None:
        super().__init__(config)
        self._service = service
        self._hurry = hurry
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts connections by accept.py."""
        await super().startup(sockets=[])  # all but the accepting
        crowd = Crowd(*places(*spare_descriptors()))
        state = self.lifespan.state
        make = partial(ServerProtocol, self.config, self.server_state, state, crowd=crowd)
        accepting = [Acceptor(each, make, self.config.ssl) for each in sockets or ()]
        self.servers.extend(accepting)  # type: ignore[arg-type]

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to drain()."""
        yield

    def drain(self) -> None:
        """Called at each signal."""
        if self._draining is not None:
            self.should_exit = True
            self._hurry.set()
            self._service.router.fail_all("shutting_down", "the server was stopped")
            return
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        service, router = self._service, self._service.router
        patience = service.settings.shutdown_s
        service.draining = True
        logger.info("shutting down: %d requests are running or waiting", len(router))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while len(router):
                    await asyncio.sleep(0.05)
        if len(router):
            cut = len(router)
            logger.warning("%d requests did not end within %g s and are cut off", cut, patience)
            router.fail_all("shutting_down", "the server is shutting down")
        # uvicorn then waits GRACE_S for open pages and for clients that do not read.
        self.should_exit = True


async def _last_spans(spans: Spans, router: RouterClient) -> None:
    """Export the traces of all requests. The router reports their ends up to a tenth of a second later
    than their answers."""
    if missing := await router.reported(REPORTS_S):
        logger.warning("the router has not reported %d requests: they are not traced", missing)
    await spans.close(EXPORT_S)


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but no longer than until `stop` is set."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
    await asyncio.gather(working, stopping, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _refresh(monitor: Monitor, service: GenerationService) -> None:
    gc.collect()
    gc.freeze()  # what was imported and built up to here is never garbage: collections skip it
    tidied_at = monotonic()
    while True:
        monitor.refresh()
        service.look()
        if monotonic() >= tidied_at + TIDY_S:
            release_memory()
            tidied_at = monotonic()
        await asyncio.sleep(REFRESH_S)


async def _beat(pulse: Pulse) -> None:
    """Show that the event loop turns, until the process ends."""
    while True:
        pulse.beat()
        await asyncio.sleep(EVERY_S)


async def _watch_parent(parent: int) -> None:
    """End when the supervisor has ended."""
    while process_runs(parent):
        await asyncio.sleep(1.0)
    os._exit(0)
