"""Serve: a cluster and the HTTP server in front of it, started, supervised and stopped together.

    bind the port                        a port in use is known at once
    router, workers, server              children of this process, restarted whenever they die
    SIGTERM, SIGINT                      the server drains, then everything ends; a second one: now

This process owns the listening socket, so connections wait while the server is restarted.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from baton.adapters.files import split_lora
from baton.adapters.identity import clash
from baton.client.blocking import Client, Notice
from baton.cluster.fleet import Fleet, with_devices
from baton.cluster.on_ray import RayPlacer, free_port
from baton.cluster.options import ClusterOptions
from baton.cluster.run_folder import write_missing
from baton.cluster.spare import WORTH_BYTES
from baton.cluster.supervisor import Beside, Cluster
from baton.errors import InputError
from baton.host import available_memory
from baton.package import own_version
from baton.server.options import ServerSettings, bind, key_lines
from baton.topology import Topology
from baton.wire.keys import load_keys, make_keys
from baton.wire.messages import ClusterInfo

INTERRUPTED = 130
GRACE_S = 8.0
"""Added to --shutdown-timeout, for the server's last events and traces: more than run.py may take."""
POLL_S = 0.05
WATCH_S = 0.1  # between two checks of the processes

Describe = Callable[[ClusterInfo], Sequence[str]]


class _Signals:
    """Counts SIGTERM and SIGINT."""

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
    check_names(options, settings)
    listener = bind(settings.host, settings.port)
    signals = _Signals()
    listener.set_inheritable(True)
    port = listener.getsockname()[1]
    _say(f"listening on {url(settings, port)}; starting {options.model}")
    try:
        with (
            Cluster(with_spare(options), lasting=True) as cluster,
            closing(Client(cluster.address, supervise=cluster.check, down=cluster.down)) as client,
        ):
            command = ["baton.server", "--fd", str(listener.fileno()), "--port", str(port)]
            command += ["--model", options.model, *settings.arguments()]
            server = Beside("server", command, (listener.fileno(),))
            if settings.api_keys:
                keys = cluster.run_dir / "api-keys"
                command += ["--api-key-file", str(keys)]
                write = partial(write_missing, keys, key_lines(settings.api_keys))
                server = replace(server, prepare=write)
            cluster.add(server)
            ready = False
            while not signals.count:
                for event in client.poll(WATCH_S):
                    if isinstance(event, Notice):
                        _say(event.text)
                    elif isinstance(event, ClusterInfo) and event.ready and not ready:
                        ready = True
                        _say(*describe(event), *_welcome(event, settings, port))
            _drain(cluster, client, settings, signals)
    finally:
        listener.close()
    return INTERRUPTED if signals.count > 1 else 0


def run_serve_on_ray(
    options: ClusterOptions,
    settings: ServerSettings,
    describe: Callable[[ClusterInfo, Topology], Sequence[str]],
    address: str | None,
) -> int:
    """The same with the workers on a Ray cluster; router and server run on this node, as actors. Returns
    the exit code. Raises BatonError."""
    check_names(options, settings)
    with closing(bind(settings.host, settings.port)) as probe:  # a port in use is known at once
        port = probe.getsockname()[1]
    with (
        TemporaryDirectory(prefix="baton-keys-") as folder,
        RayPlacer(address) as placer,
    ):
        signals = _Signals()  # after ray, which takes SIGTERM for itself
        make_keys(keys := Path(folder) / "keys")
        fleet = Fleet(
            placer,
            options := with_devices(options, placer.gpus),
            host=placer.host,
            port=free_port(placer.host),
            version=own_version(),
            keys={each.name: each.read_bytes() for each in keys.iterdir()},
        )
        _say(f"listening on {url(settings, port)}; placing {options.topology}")
        server = ["--port", str(port), "--model", options.model, *settings.arguments()]
        fleet.start(server, key_lines(settings.api_keys))
        client = Client(fleet.address, keys=load_keys(keys), supervise=fleet.check, down=fleet.down)
        with closing(client):
            info, ready = None, False
            while not signals.count:
                for event in client.poll(WATCH_S):
                    if isinstance(event, Notice):
                        _say(event.text)
                    elif isinstance(event, ClusterInfo):
                        info = event
                if not ready and info is not None and info.ready and _listens(settings, port):
                    ready = True
                    _say(*describe(info, options.topology), *_welcome(info, settings, port))
            _say(f"{signals.last.name}: no new requests; again to end now")
            fleet.leave("server")
            deadline = time.monotonic() + settings.shutdown_s + GRACE_S
            while fleet.has("server") and signals.count < 2 and time.monotonic() < deadline:
                for event in client.poll(POLL_S):
                    if isinstance(event, Notice):
                        _say(event.text)
    return INTERRUPTED if signals.count > 1 else 0


def check_names(options: ClusterOptions, settings: ServerSettings) -> None:
    """InputError if an adapter has a name of the model. Without --served-model-name the router checks."""
    for given in options.lora:
        if (name := split_lora(given)[0]) in settings.served_names:
            raise InputError(clash(name))


def _listens(settings: ServerSettings, port: int) -> bool:
    """Whether the server takes connections."""
    try:
        socket.create_connection((settings.host, port), timeout=WATCH_S).close()
    except OSError:
        return False
    return True


def with_spare(options: ClusterOptions) -> ClusterOptions:
    """A service keeps a spare worker where there is memory for it, unless the user has decided."""
    if options.spare_worker is not None:
        return options
    return replace(options, spare_worker=(available_memory() or 0) >= WORTH_BYTES)


def _welcome(info: ClusterInfo, settings: ServerSettings, port: int) -> Iterator[str]:
    address = url(settings, port)
    name = (settings.served_names or (info.model,))[0]
    yield f"ready     {address} is the page, {address}/v1 the API, {address}/docs its list"
    yield (
        f"try       curl {address}/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "prompt": "In the future", "max_tokens": 20}}\''
    )
    if settings.allow_lora_updates is not None:
        yield f"adapters  clients may load those below {settings.allow_lora_updates}, and unload any"
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
        yield "warning   others on the network can use this server: add --api-key-file"


def _drain(cluster: Cluster, client: Client, settings: ServerSettings, signals: _Signals) -> None:
    """The server ends its requests, and workers that die meanwhile are replaced. A second signal, or too
    long a wait, ends it."""
    server = cluster.let_end("server")
    if server is None:
        return
    _say(f"{signals.last.name}: no new requests; again to end now")
    os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + settings.shutdown_s + GRACE_S
    while "server" in cluster.running() and signals.count < 2 and time.monotonic() < deadline:
        for event in client.poll(POLL_S):
            if isinstance(event, Notice):
                _say(event.text)


def url(settings: ServerSettings, port: int) -> str:
    """For a browser on this machine."""
    scheme = "https" if settings.certificate else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}"


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
