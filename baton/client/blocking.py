"""Client: one router, for programs without an event loop: the offline job, the library, tools, tests.

Blocking, one thread. What happens when the router is lost: baton/client/tracker.py.
"""

import secrets
from collections.abc import Callable
from math import inf

import zmq

from baton.client.tracker import (
    Event,
    News,
    PendingRequest,
    RequestTracker,
    Resubmitted,
    RouterLost,
    Update,
)
from baton.clock import Clock, monotonic
from baton.errors import ProtocolError
from baton.wire.channel import Dialer
from baton.wire.keys import ClusterKeys
from baton.wire.messages import ClusterInfo, Observed, Submit
from baton.wire.node import ROUTER

Received = News | ClusterInfo | Resubmitted

CONNECT_S = 0.05  # while there is no router, the longest wait before trying again to reach one


class Client:
    """Submit requests and poll for their news."""

    def __init__(
        self,
        address: str,
        *,
        keys: ClusterKeys | None = None,
        observe: Callable[[Observed], None] | None = None,
        channel: Dialer | None = None,
        clock: Clock = monotonic,
        give_up_s: float = inf,
    ) -> None:
        """`observe` is called with the events of all requests of the router. `channel` replaces the
        connection to `address`. `give_up_s`: see RequestTracker."""
        self.address = address
        self._observe = observe
        self._channel = channel or Dialer(f"client.{secrets.token_hex(4)}", address, keys)
        self._clock = clock
        self._tracker = RequestTracker(clock(), give_up_s=give_up_s, observe=observe is not None)
        self._requests: dict[str, PendingRequest] = {}
        self._kept: list[Received] = []

    @property
    def lost_since(self) -> float | None:
        """Since when no router has answered, on the client's clock; None while one does."""
        return self._tracker.lost_since

    def info(self, *, timeout_s: float) -> ClusterInfo:
        """Ask the router what it serves; later changes arrive through poll(). Raises ProtocolError if
        no router answers in time."""
        deadline = self._clock() + timeout_s
        self.inquire()
        while (now := self._clock()) < deadline:
            received = self._exchange(deadline - now)
            self._kept += received
            for each in received:
                if isinstance(each, ClusterInfo):
                    self._kept.remove(each)
                    return each
        raise self.no_answer(timeout_s)

    def no_answer(self, timeout_s: float) -> ProtocolError:
        """The error for a router that has not answered for so long."""
        return ProtocolError(
            f"no router answers at {self.address} within {timeout_s:g} s; start one with "
            f"`python -m router --address {self.address}` or check --router and --keys"
        )

    def inquire(self) -> None:
        """Ask the router for its ClusterInfo, which arrives through poll()."""
        if self._tracker.lost_since is None:
            self._tracker.inquire(self._clock())
            self._send()

    def submit(self, *requests: Submit) -> None:
        """Send requests together, so that the router can fill them as one batch; at once, or as soon
        as a router answers. Their news arrive through poll()."""
        for each in requests:
            self._requests[each.request] = self._tracker.submit(each)
        self._send()

    def abort(self, request: str) -> None:
        """End a request: Finished(reason="abort") arrives through poll()."""
        if (pending := self._requests.get(request)) is not None:
            self._take(self._tracker.abort(pending), self._kept)
            self._send()

    def forget(self, request: str) -> None:
        """End a request, with no further news of it."""
        if (pending := self._requests.pop(request, None)) is not None:
            self._tracker.forget(pending)
            self._send()

    def poll(self, timeout_s: float) -> list[Received]:
        """What has arrived; waits up to `timeout_s` for the first. Empty if nothing came."""
        if self._kept:
            kept, self._kept = self._kept, []
            return kept
        return self._exchange(timeout_s)

    def close(self) -> None:
        """Disconnect. The router withdraws what this client still has running when it next sends to it:
        forget() the requests first if that is too late."""
        self._channel.close(linger_s=0.2)

    def _exchange(self, timeout_s: float) -> list[Received]:
        received = self._receive()
        self._take(self._tracker.tick(self._clock()), received)
        self._send()
        if received:
            return received
        wait_s = timeout_s if self._tracker.lost_since is None else min(timeout_s, CONNECT_S)
        return self._receive() if self._channel.socket.poll(int(wait_s * 1000), zmq.POLLIN) else []

    def _receive(self) -> list[Received]:
        received: list[Received] = []
        for _, messages in self._channel.receive():
            for message in messages:
                if isinstance(message, Observed) and self._observe is not None:
                    self._observe(message)
                self._take(self._tracker.received(message, self._clock()), received)
        self._send()
        return received

    def _send(self) -> None:
        messages = self._tracker.messages_to_send()
        if messages and not self._channel.send(ROUTER, *messages):
            why = "it takes no messages"
            self._take(self._tracker.connection_lost(self._clock(), why, messages), self._kept)

    def _take(self, events: list[Event], received: list[Received]) -> None:
        for event in events:
            match event:
                case Update(request, news):
                    if request.ended:
                        self._requests.pop(request.id, None)
                    received.append(news)
                case ClusterInfo() | Resubmitted():
                    received.append(event)
                case RouterLost():
                    pass
