"""Serve: a cluster and the HTTP server in front of it, started, supervised and stopped together.

    bind the port                        a port in use is known at once
    router, workers, server              children of this process, restarted when they die
    SIGTERM, SIGINT                      the server drains, then everything ends; a second one: now

This process owns the listening socket, so connections wait while the server is restarted.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

from baton.client.blocking import Client, Notice, Received
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Beside, Cluster
from baton.server.listen import bind
from baton.server.options import ServerSettings
from baton.wire.messages import ClusterInfo

INTERRUPTED = 130
GRACE_S = 5.0
"""Added to --shutdown-timeout, for the server's last events."""
POLL_S = 0.05
WATCH_S = 0.1  # between two looks at the processes

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
            keys = cluster.run_dir / "api-keys"
            command += arguments(settings, options.model, keys)
            cluster.add(Beside("server", command, (listener.fileno(),)))
            with closing(Client(cluster.address, supervise=cluster.check)) as client:
                _supervise(cluster, client, settings, port, describe, signals)
    finally:
        listener.close()
    return INTERRUPTED if signals.count > 1 else 0


def arguments(settings: ServerSettings, model: str, keys: Path) -> list[str]:
    """The server's own command line. API keys go through a file of mode 0600, not through `ps`."""
    found = ["--model", model, "--host", settings.host]
    found += ["--max-num-queued-reqs", str(settings.max_queued)]
    found += ["--stream-interval-ms", f"{settings.stream_interval_s * 1e3:g}"]
    found += ["--shutdown-timeout", f"{settings.shutdown_s:g}"]
    found += ["--log-level", settings.log_level, "--log-format", settings.log_format]
    if settings.otlp_endpoint:
        found += ["--otlp-endpoint", settings.otlp_endpoint]
    for flag, values in (
        ("--served-model-name", settings.served_names),
        ("--allowed-host", settings.allowed_hosts),
        ("--allowed-origin", settings.allowed_origins),
    ):
        for value in values:
            found += [flag, value]
    for flag, path in (
        ("--chat-template", settings.chat_template),
        ("--ssl-certfile", settings.certificate),
        ("--ssl-keyfile", settings.private_key),
    ):
        if path is not None:
            found += [flag, str(path.resolve())]
    if settings.api_keys:
        with open(os.open(keys, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"{key}\n" for key in settings.api_keys)
        found += ["--api-key-file", str(keys)]
    return found


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
    ready = False
    while not signals.count:
        for event in client.poll(WATCH_S):
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
    event: Received,
    settings: ServerSettings,
    port: int,
    describe: Describe,
    *,
    ready: bool,
) -> bool:
    match event:
        case Notice(text):
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
