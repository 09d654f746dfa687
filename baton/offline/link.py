"""Link: the job's client of its router, and the processes of the cluster if the job starts them."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from baton.client.blocking import Client, Notice
from baton.cluster.supervisor import Cluster
from baton.offline.interrupts import held_back
from baton.offline.settings import OwnCluster, Target
from baton.offline.waiting import WaitingLines
from baton.timing import Stages
from baton.wire.keys import load_keys
from baton.wire.messages import ClusterInfo, Observed

QUEUE_FACTOR = 4
"""Requests to keep with an own router, as a multiple of the batch size: a free slot of the batch always
finds a request in the router's queue."""


@contextmanager
def link_to(
    target: Target, *, startup: Stages, observe: Callable[[Observed], None] | None = None
) -> Iterator[Client]:
    """A client of the running cluster, or of a new one, which is stopped in any case."""
    if not isinstance(target, OwnCluster):
        keys = load_keys(target.keys) if target.keys else None
        with closing(Client(target.router, keys=keys, observe=observe)) as client:
            yield client
        return
    cluster = Cluster(target.options)
    try:
        cluster.start()
        startup.lap("processes started")
        with closing(
            Client(cluster.address, observe=observe, supervise=cluster.check, down=cluster.down)
        ) as client:
            yield client
    finally:
        with held_back():
            cluster.stop()


def await_cluster(client: Client, startup: Stages, say: Callable[[str], None]) -> ClusterInfo:
    """Wait until the cluster can work. Raises as Client.await_ready() does."""
    answered = False

    def see(event: ClusterInfo | Notice) -> None:
        nonlocal answered
        if isinstance(event, Notice):
            say(event.text)
        elif not answered:
            answered = True
            startup.lap("router answered")

    lines = WaitingLines()

    def waiting(what: str, seconds: float) -> None:
        if (line := lines.line(what, seconds)) is not None:
            say(line)

    info = client.await_ready(see, waiting)
    startup.lap("workers ready")
    return info


def load_s(startup: Stages) -> float:
    """Seconds from the start of the processes until they were ready."""
    return startup.total_s("router answered") + startup.total_s("workers ready")
