"""Watchers: clients that want the ClusterInfo and every change of it."""

from collections.abc import Callable

from baton.wire.messages import ClusterInfo
from baton.wire.node import Effect, To
from router.admission import Served
from router.workers import WorkerRegistry


class Watchers:
    """Clients that have asked, and what was last sent to each."""

    def __init__(self) -> None:
        self._sent: dict[str, ClusterInfo | None] = {}

    def add(self, client: str) -> None:
        """It asks, perhaps again: it gets an answer in any case."""
        self._sent[client] = None

    def remove(self, client: str) -> None:
        """It has left."""
        self._sent.pop(client, None)

    def updates(self, look: Callable[[], ClusterInfo]) -> list[Effect]:
        """The ClusterInfo for every watcher that has an older one. `look` is called if there are any."""
        if not self._sent:
            return []
        info = look()
        behind = [client for client, sent in self._sent.items() if sent != info]
        self._sent.update(dict.fromkeys(behind, info))
        return [To(client, info) for client in behind]


def cluster_info(
    served: Served, members: WorkerRegistry, now: float, *, colocated: bool
) -> ClusterInfo:
    """The served model, the workers, and what is missing before requests can be served."""
    missing = members.missing(colocated=colocated, now=now)
    return ClusterInfo(
        ready=not missing,
        model=served.name,
        fingerprint=served.fingerprint,
        context=served.limits.context,
        vocabulary=served.limits.vocabulary,
        dtype=next((member.hello.dtype for member in members), ""),
        sampling=served.sampling,
        workers=members.infos(now),
        waiting_for=missing,
    )
