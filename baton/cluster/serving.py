"""ServingCluster: a cluster and an HTTP server for it, started for one job that works over HTTP."""

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

from baton.client.blocking import POLL_S, Client, Notice
from baton.client.http import HttpClient
from baton.clock import Clock, monotonic
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Beside, Cluster
from baton.errors import BatonError

QUEUE_FACTOR = 10
"""Requests that may wait, as a multiple of those that run: the job paces itself, so the server need not
refuse any."""

READY_S = 120.0  # from the cluster's readiness to the server's


@dataclass(frozen=True, slots=True)
class ServingCluster:
    """Call supervise() regularly while using `http`. `client` reaches the router directly."""

    port: int
    cluster: Cluster
    client: Client
    say: Callable[[str], None]

    @property
    def http(self) -> HttpClient:
        """A client of the server."""
        return HttpClient(f"http://127.0.0.1:{self.port}")

    def supervise(self) -> None:
        """Restart processes that died, and report it."""
        for event in self.client.poll(POLL_S):
            if isinstance(event, Notice):
                self.say(event.text)


@contextmanager
def serving_cluster(
    options: ClusterOptions, *, limit: int, say: Callable[[str], None], server: Sequence[str] = ()
) -> Iterator[ServingCluster]:
    """Start it and wait until it is ready; stop it in any case. `server`: more server options."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
        Cluster(options) as cluster,
    ):
        listener.set_inheritable(True)
        port, number = listener.getsockname()[1], listener.fileno()
        command = ["baton.server", "--fd", str(number), "--port", str(port)]
        command += ["--model", options.model, "--log-level", "error"]
        command += ["--max-num-queued-reqs", str(QUEUE_FACTOR * limit), *server]
        cluster.add(Beside("server", command, (number,)))
        with closing(Client(cluster.address, supervise=cluster.check, down=cluster.down)) as client:
            serving = ServingCluster(port, cluster, client, say)
            client.await_ready(lambda event: say(event.text) if isinstance(event, Notice) else None)
            _await_server(serving, monotonic)
            yield serving


def _await_server(serving: ServingCluster, clock: Clock) -> None:
    """The probe runs in a thread because it may block: this process owns the listening socket, so while
    a dead server is restarted, a connection is accepted but not answered."""
    deadline = clock() + READY_S
    executor = ThreadPoolExecutor(1)
    try:
        probe = executor.submit(_ready, serving.http)
        while True:
            if probe.done():
                if probe.result():
                    return
                probe = executor.submit(_ready, serving.http)
            if clock() >= deadline:
                raise BatonError(f"the HTTP server was not ready in {READY_S:.0f} s: see its log")
            serving.supervise()
    finally:
        executor.shutdown(wait=False)


def _ready(client: HttpClient) -> bool:
    try:
        return client.ask("/readyz").status == 200
    except (OSError, ValueError):
        return False
