"""Link: a way to a router, and who looks after the processes behind it."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.client.batch import Follower, Line, Supervisor
from baton.client.blocking import Client
from baton.clock import monotonic
from baton.cluster.supervisor import Cluster, ClusterOptions
from baton.errors import InputError
from baton.offline.interrupts import held_back
from baton.offline.settings import Place
from baton.timing import Stages
from baton.wire.keys import load_keys
from baton.wire.messages import ClusterInfo, Observed

Observe = Callable[[Observed], None]
IN_THE_ROUTER = 4
"""Requests with our own router for each that may run at once: so none of its places is ever idle."""


class Elsewhere:
    """The supervisor of a cluster that somebody else runs: nothing to do, nothing to say. A cut
    connection is as good as a new router: what was on its way is gone."""

    mends = False

    def __init__(self, losses: Callable[[], int]) -> None:
        self._losses = losses

    @property
    def router_restarts(self) -> int:
        return self._losses()

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        return []


@dataclass(frozen=True, slots=True)
class Link:
    """`ours`: the processes were started for this job and end with it."""

    follower: Follower
    ours: bool
    client: Client


@contextmanager
def link_to(
    place: Place,
    *,
    batch_size: int,
    startup: Stages,
    observe: Observe | None = None,
) -> Iterator[Link]:
    """The running cluster if one is named, else one of our own, stopped whatever happens."""
    if place.router is None:
        with _own_cluster(place, batch_size, startup, observe) as link:
            yield link
        return
    keys = load_keys(place.keys) if place.keys else None
    client = Client(place.router, keys=keys, observe=observe)
    try:
        yield Link(_follower(client, Elsewhere(lambda: client.losses), batch_size), False, client)
    finally:
        client.close()


def cluster_options(place: Place, *, batch_size: int) -> ClusterOptions:
    """For a cluster of our own."""
    if place.topology is None:
        raise InputError("a cluster of our own needs a topology")
    return ClusterOptions(
        model=place.model,
        topology=place.topology,
        batch_size=batch_size,
        batch_window_ms=place.batch_window_ms,
        dtype=place.dtype,
        max_model_len=place.max_model_len,
        kv_cache_memory_bytes=place.kv_cache_memory_bytes,
        kv_transport=place.kv_transport,
        speculative_model=place.speculative_model,
        num_speculative_tokens=place.num_speculative_tokens,
        prefix_caching=place.prefix_caching,
    )


@contextmanager
def _own_cluster(
    place: Place, batch_size: int, startup: Stages, observe: Observe | None
) -> Iterator[Link]:
    cluster = Cluster(cluster_options(place, batch_size=batch_size))
    client: Client | None = None
    try:
        cluster.start()
        startup.lap("processes started")
        client = Client(cluster.address, observe=observe)
        yield Link(_follower(client, cluster, batch_size * IN_THE_ROUTER), True, client)
    finally:
        with held_back():
            if client is not None:
                client.close()
            cluster.stop()


def _follower(line: Line, supervisor: Supervisor, limit: int) -> Follower:
    return Follower(line, supervisor, job=secrets.token_hex(6), limit=limit, clock=monotonic)
