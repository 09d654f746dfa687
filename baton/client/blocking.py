"""Client: one router, for programs without an event loop: the offline job, the library, tools, tests.

Blocking, one thread. What happens when the router is lost: baton/client/tracker.py. The processes of
the cluster, if this program has started them, are supervised in poll().
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from baton.package import spelled
from baton.wire.channel import Dialer
from baton.wire.keys import ClusterKeys
from baton.wire.messages import ClusterInfo, Observed, Submit, Supervised
from baton.wire.node import ROUTER
from baton.wire.records import ProcessDown

CONNECT_S = 0.05  # while there is no router, the longest wait before trying again to reach one
POLL_S = 0.1
ANSWER_S = 5.0  # a router that nothing restarts must answer within this time
READY_S = 900.0  # loading the largest models from a slow disk; a dead worker is noticed at once

Supervise = Callable[[ClusterInfo | None], list[str]]
"""Restarts processes that died, the router included; takes the latest ClusterInfo if there is a new
one, returns notices for the user, raises what a restart cannot mend: Cluster.check."""

Down = Callable[[], tuple[ProcessDown, ...]]
"""The processes that do not work now: Cluster.down."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A line for the user."""

    text: str


Received = News | ClusterInfo | Notice


class Client:
    """Submit requests and poll for their news."""

    idle_s: float | None = 0.25  # poll interval without requests, to supervise the processes

    def __init__(
        self,
        address: str,
        *,
        keys: ClusterKeys | None = None,
        observe: Callable[[Observed], None] | None = None,
        channel: Dialer | None = None,
        clock: Clock = monotonic,
        give_up_s: float = inf,
        supervise: Supervise | None = None,
        down: Down | None = None,
    ) -> None:
        """`observe` is called with the events of all requests of the router. `channel` replaces the
        connection to `address`. `give_up_s`: see RequestTracker. `supervise` is called by poll(), and
        what is `down` after it is reported to the router."""
        self.address = address
        self.clock = clock
        self._observe = observe
        self._channel = channel or Dialer(f"client.{secrets.token_hex(4)}", address, keys)
        self._supervise = supervise
        self._down = down
        self._reported: tuple[ProcessDown, ...] | None = ()  # None: unknown
        self._unchecked: ClusterInfo | None = None  # not yet passed on to the supervisor
        self._tracker = RequestTracker(clock(), give_up_s=give_up_s, observe=observe is not None)
        self._requests: dict[str, PendingRequest] = {}
        self._kept: list[Received] = []

    def info(self, *, timeout_s: float) -> ClusterInfo:
        """Ask the router what it serves; later changes arrive through poll(). Raises ProtocolError if
        no router answers in time."""
        deadline = self.clock() + timeout_s
        self._inquire()
        while (now := self.clock()) < deadline:
            received = self._exchange(deadline - now)
            self._kept += received
            for each in received:
                if isinstance(each, ClusterInfo):
                    self._kept.remove(each)
                    return each
        raise self._no_answer(timeout_s)

    def await_ready(
        self,
        see: Callable[[ClusterInfo | Notice], object] = lambda event: None,
        waiting: Callable[[str, float], object] = lambda what, seconds: None,
    ) -> ClusterInfo:
        """Wait until the cluster is ready; `see` is called with each event meanwhile, `waiting` again and
        again with what is missing and the seconds so far. Raises ProtocolError after READY_S, or as
        check_answering() does, and what `supervise` raises."""
        began = self.clock()
        info: ClusterInfo | None = None
        self._inquire()
        while info is None or not info.ready:
            for event in self.poll(POLL_S):
                if isinstance(event, ClusterInfo | Notice):
                    see(event)
                    info = event if isinstance(event, ClusterInfo) else info
            self.check_answering()
            silent = f"the router does not answer at {self.address}"
            waiting_for = info.waiting_for if info else silent
            if info is None or not info.ready:
                waiting(waiting_for, self.clock() - began)
            if self.clock() >= began + READY_S:
                raise ProtocolError(
                    f"the cluster was not ready after {READY_S:.0f} s: {waiting_for}"
                )
        return info

    def check_answering(self) -> None:
        """Raise ProtocolError if the router has not answered for ANSWER_S and nothing restarts it."""
        lost_since = self._tracker.lost_since
        if self._supervise is not None or lost_since is None:
            return
        if self.clock() >= lost_since + ANSWER_S:
            raise self._no_answer(ANSWER_S)

    def _no_answer(self, timeout_s: float) -> ProtocolError:
        return ProtocolError(
            f"no router answers at {self.address} within {timeout_s:g} s; start one with "
            + spelled(f"`python -m router --address {self.address}` or check --router and --keys")
        )

    def _inquire(self) -> None:
        if self._tracker.lost_since is None:
            self._tracker.inquire(self.clock())
            self._send()

    def submit(self, *requests: Submit) -> None:
        """Send requests together, so that the router can fill them as one batch; at once, or as soon
        as a router answers. Their news arrive through poll()."""
        for each in requests:
            self._requests[each.request] = self._tracker.submit(each, now=self.clock())
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
        """What has arrived; waits up to `timeout_s` for the first. Empty if nothing came. Supervises
        the processes first, and raises what a restart cannot mend (WorkerLost and others)."""
        notices: list[Received] = []
        if self._supervise is not None:
            info, self._unchecked = self._unchecked, None
            notices += map(Notice, self._supervise(info))
        self._report()
        received, self._kept = self._kept, []
        received = received or self._exchange(timeout_s)
        return notices + received

    def close(self) -> None:
        """Disconnect. The router withdraws what this client still has running when it next sends to it:
        forget() the requests first if that is too late."""
        self._channel.close(linger_s=0.2)

    def _report(self) -> None:
        """Tell the router which processes are down: after every change, and each new router."""
        if self._down is None or self._tracker.lost_since is not None:
            return
        down = self._down()
        if self._reported is None or _changed(down, self._reported):
            self._reported = down
            if not self._channel.send(ROUTER, Supervised(down)):
                self._reported = None

    def _exchange(self, timeout_s: float) -> list[Received]:
        received = self._receive()
        self._take(self._tracker.tick(self.clock()), received)
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
                self._take(self._tracker.received(message, self.clock()), received)
        self._send()
        return received

    def _send(self) -> None:
        messages = self._tracker.messages_to_send()
        if messages and not self._channel.send(ROUTER, *messages):
            why = "it takes no messages"
            self._take(self._tracker.connection_lost(self.clock(), why, messages), self._kept)

    def _take(self, events: list[Event], received: list[Received]) -> None:
        for event in events:
            match event:
                case Update(request, news):
                    if request.ended:
                        self._requests.pop(request.id, None)
                    received.append(news)
                case ClusterInfo():
                    self._unchecked = event
                    received.append(event)
                case Resubmitted(requests):
                    text = f"the router was lost and found again: {requests} requests begin again"
                    received.append(Notice(text))
                case RouterLost():
                    self._unchecked = self._reported = None


def _changed(down: tuple[ProcessDown, ...], reported: tuple[ProcessDown, ...]) -> bool:
    """Whether the router should know. That time passes until a start is no news; the start is."""
    return _without_times(down) != _without_times(reported)


def _without_times(down: tuple[ProcessDown, ...]) -> list[ProcessDown]:
    return [replace(each, restart_in_s=float(each.restart_in_s > 0)) for each in down]
