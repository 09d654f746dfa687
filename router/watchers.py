"""Watchers: clients that want to know what is served, and by whom, and every change of it."""

from collections.abc import Callable

from baton.wire.messages import ClusterInfo
from baton.wire.node import Effect, To
from router.admission import Served
from router.members import Members


class Watchers:
    """Clients that have asked, and what each was told last."""

    def __init__(self) -> None:
        self._told: dict[str, ClusterInfo | None] = {}

    def add(self, client: str) -> None:
        """It asks, perhaps again: it is told in any case."""
        self._told[client] = None

    def remove(self, client: str) -> None:
        """It has left."""
        self._told.pop(client, None)

    def tell(self, look: Callable[[], ClusterInfo]) -> list[Effect]:
        """The news, to those who do not have it yet. Looks only if somebody watches."""
        if not self._told:
            return []
        info = look()
        behind = [client for client, told in self._told.items() if told != info]
        self._told.update(dict.fromkeys(behind, info))
        return [To(client, info) for client in behind]


def cluster_info(served: Served, members: Members, now: float, *, colocated: bool) -> ClusterInfo:
    """What is served, by whom, and what is missing before a request would be worked on."""
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
