"""Front: a cluster with a server in front of it, both of our own, ready to be asked over HTTP."""

import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from baton.client.batch import Follower, Happening, Note
from baton.client.blocking import Client
from baton.client.http import Site
from baton.clock import Clock, monotonic
from baton.cluster.supervisor import Beside, Cluster, ClusterOptions
from baton.errors import BatonError

QUEUED = 10
"""So many requests for each one that runs may wait: whoever asks sets the pace, not the server."""

READY_S = 120.0  # from the cluster's readiness to the server's


@dataclass(frozen=True, slots=True)
class Front:
    """`follower` may ask the cluster itself; whoever only asks the site calls tend() now and then."""

    port: int
    cluster: Cluster
    follower: Follower
    say: Callable[[str], None]
    happenings: Iterator[Happening] = field(repr=False)

    @property
    def site(self) -> Site:
        """Where to ask."""
        return Site(f"http://127.0.0.1:{self.port}")

    def tend(self) -> None:
        """Replace what has died, and tell of it, until there is nothing more to tell."""
        for happening in self.happenings:
            match happening:
                case Note(""):
                    return
                case Note(text):
                    self.say(text)


@contextmanager
def fronted(
    options: ClusterOptions,
    *,
    limit: int,
    say: Callable[[str], None],
    server: Sequence[str] = (),
    clock: Clock = monotonic,
) -> Iterator[Front]:
    """Started, ready, and ended whatever happens. `server`: more of its command line."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
        Cluster(options) as cluster,
    ):
        listener.set_inheritable(True)
        port, number = listener.getsockname()[1], listener.fileno()
        command = [
            "baton.server",
            "--fd",
            str(number),
            "--port",
            str(port),
            "--model",
            options.model,
        ]
        command += ["--log-level", "error", "--max-num-queued-reqs", str(QUEUED * limit), *server]
        cluster.add(Beside("server", command, (number,)))
        client = Client(cluster.address)
        try:
            job = secrets.token_hex(4)
            follower = Follower(client, cluster, job=job, limit=limit, clock=clock)
            for happening in follower.await_ready(ours=True):
                if isinstance(happening, Note):
                    say(happening.text)
            front = Front(port, cluster, follower, say, follower.watch())
            _await_server(front, clock)
            yield front
        finally:
            client.close()


def _await_server(front: Front, clock: Clock) -> None:
    """Asked in a thread: a server that dies at its start leaves who asks waiting at the socket, which
    is ours, until tend() has started the next one."""
    deadline = clock() + READY_S
    beside = ThreadPoolExecutor(1)
    try:
        asked = beside.submit(_ready, front.site)
        while True:
            if asked.done():
                if asked.result():
                    return
                asked = beside.submit(_ready, front.site)
            if clock() >= deadline:
                raise BatonError(f"the server was not ready within {READY_S:.0f} s")
            front.tend()
    finally:
        beside.shutdown(wait=False)


def _ready(site: Site) -> bool:
    try:
        return site.ask("/readyz").status == 200
    except (OSError, ValueError):
        return False
