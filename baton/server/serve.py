"""Serve: a cluster and the HTTP server in front of it, started, supervised and stopped together.

    bind the port                        a port in use is known at once
    router, workers, server              children of this process, restarted when they die
    SIGTERM, SIGINT                      the server drains, then everything ends; a second one: now

This process owns the listening socket, so connections wait while the server is restarted.
"""

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from baton.client.batch import BatchClient, Event, Notice
from baton.client.blocking import Client
from baton.clock import monotonic
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Beside, Cluster
from baton.server.options import ServerSettings, bind, write_keys
from baton.wire.messages import ClusterInfo

INTERRUPTED = 130
GRACE_S = 5.0
"""Added to --shutdown-timeout, for the server's last events."""
POLL_S = 0.05

Describe = Callable[[ClusterInfo], Sequence[str]]


class _Signals:
    """Counts the signals that ask this process to end."""

    def __init__(self) -> None:
        self.count = 0
        self.last = signal.SIGTERM
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = signal.Signals(number)


def run_serve(options: ClusterOptions, settings: ServerSettings, describe: Describe) -> int:
    """Serve until a signal. Returns the exit code. Raises BatonError."""
    listener = bind(settings.host, settings.port)
    signals = _Signals()
    listener.set_inheritable(True)
    port = listener.getsockname()[1]
    _say(f"listening on {url(settings, port)}; starting {options.model}")
    try:
        with Cluster(options) as cluster:
            command = ["baton.server", "--fd", str(listener.fileno()), "--port", str(port)]
            command += ["--model", options.model, *settings.arguments()]
            if settings.api_keys:
                keys = cluster.run_dir / "api-keys"
                write_keys(settings.api_keys, keys)
                command += ["--api-key-file", str(keys)]
            cluster.add(Beside("server", command, (listener.fileno(),)))
            client = Client(cluster.address)
            try:
                _supervise(cluster, client, settings, port, describe, signals)
            finally:
                client.close()
    finally:
        listener.close()
    return INTERRUPTED if signals.count > 1 else 0


def url(settings: ServerSettings, port: int) -> str:
    """For a browser on this machine."""
    scheme = "https" if settings.certificate else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}"


def _supervise(
    cluster: Cluster,
    client: Client,
    settings: ServerSettings,
    port: int,
    describe: Describe,
    signals: _Signals,
) -> None:
    batch = BatchClient(client, cluster, job=secrets.token_hex(6), limit=1, clock=monotonic)
    ready = False
    for event in batch.watch():
        if signals.count:
            break
        ready = _report(event, settings, port, describe, ready=ready)
    server = cluster.pids().get("server")
    if server is None:
        return
    _say(f"{signals.last.name}: no new requests; again to end now")
    os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + settings.shutdown_s + GRACE_S
    while "server" in cluster.running() and signals.count < 2 and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _report(
    event: Event,
    settings: ServerSettings,
    port: int,
    describe: Describe,
    *,
    ready: bool,
) -> bool:
    match event:
        case Notice(text) if text:
            _say(text)
        case ClusterInfo() as info if info.ready and not ready:
            for line in describe(info):
                _say(line)
            address = url(settings, port)
            name = (settings.served_names or (info.model,))[0]
            _say(f"ready     {address} is the page, {address}/v1 the API, {address}/docs its list")
            _say(
                f"try       curl {address}/v1/completions -H 'Content-Type: application/json' "
                f'-d \'{{"model": "{name}", "prompt": "In the future", "max_tokens": 20}}\''
            )
            if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
                _say("warning   others on the network can use this server: add --api-key-file")
            return True
    return ready


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
