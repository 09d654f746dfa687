"""Link: a client of the job's router, and the processes of the cluster if the job has started them."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.client.batch import BatchClient
from baton.client.blocking import Client
from baton.clock import monotonic
from baton.cluster.supervisor import Cluster
from baton.offline.interrupts import held_back
from baton.offline.settings import OwnCluster, Target
from baton.timing import Stages
from baton.wire.keys import load_keys
from baton.wire.messages import ClusterInfo, Observed

Observe = Callable[[Observed], None]
QUEUE_FACTOR = 4
"""Requests to keep with an own router, as a multiple of the batch size: a free slot of the batch always
finds a request in the router's queue."""


class ExternalCluster:
    """The supervisor of a cluster that was started elsewhere: there are no processes to restart."""

    restarts_router = False

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        return []


@dataclass(frozen=True, slots=True)
class Link:
    """`owns_cluster`: the processes were started for this job and end with it."""

    batch: BatchClient
    owns_cluster: bool
    client: Client


@contextmanager
def link_to(
    target: Target, *, batch_size: int, startup: Stages, observe: Observe | None = None
) -> Iterator[Link]:
    """A client of the running cluster, or of a new one, which is stopped in any case."""
    if isinstance(target, OwnCluster):
        with _own_cluster(target, startup, observe) as link:
            yield link
        return
    keys = load_keys(target.keys) if target.keys else None
    client = Client(target.router, keys=keys, observe=observe)
    try:
        yield Link(_batch_client(client, ExternalCluster(), batch_size), False, client)
    finally:
        client.close()


@contextmanager
def _own_cluster(target: OwnCluster, startup: Stages, observe: Observe | None) -> Iterator[Link]:
    cluster = Cluster(target.options)
    client: Client | None = None
    try:
        cluster.start()
        startup.lap("processes started")
        client = Client(cluster.address, observe=observe)
        limit = target.options.batch_size * QUEUE_FACTOR
        yield Link(_batch_client(client, cluster, limit), True, client)
    finally:
        with held_back():
            if client is not None:
                client.close()
            cluster.stop()


def _batch_client(client: Client, supervisor: Cluster | ExternalCluster, limit: int) -> BatchClient:
    return BatchClient(client, supervisor, job=secrets.token_hex(6), limit=limit, clock=monotonic)
