"""Membership: the part every worker node shares: joining a router, heartbeats, starting anew.

new -- Hello --> waiting -- Welcome --> joined -- Reset, or the router is gone --> new (next epoch)
"""

from collections.abc import Callable
from dataclasses import replace

from baton.kv.region import Region
from baton.wire import messages as msg
from baton.wire.messages import Hello, Message
from baton.wire.node import ROUTER, Effect, Stop, To, Watch

BEAT_S = 1.0
KNOCK_S = 0.25
ROUTER_PATIENCE_S = 5.0
"""A router silent for so long is gone: it has no long steps. Same-host deaths are seen at once."""


ORDERS = (msg.Attach, msg.Fill, msg.Reserve, msg.Start)
"""Orders that arrive before Welcome were meant for an older life of the worker."""


class Membership:
    """Keeps one worker in a cluster. `start_anew(epoch)` must drop everything of the old epoch and
    gives the regions its pool can be reached by in the new one."""

    def __init__(self, hello: Hello, start_anew: Callable[[str], tuple[Region, ...]]) -> None:
        self.hello = hello
        self._start_anew = start_anew
        self._life = 0
        self.joined = False  # the router has welcomed this life of the worker
        self._router_epoch = ""
        self._router_heard = 0.0
        self._next_beat = 0.0
        self._steps = 0

    def handle(self, message: Message, now: float) -> list[Effect] | None:
        """Effects if the message was about membership, or is not for this life of the worker; None
        if it is for the worker's own work."""
        match message:
            case msg.Exited(peer) | msg.Unreachable(peer):
                if peer != ROUTER:
                    return None
                return self._renew(now) if self.joined else []
        self._router_heard = now
        match message:
            case msg.Welcome(epoch, host, pid):
                self.joined, self._router_epoch = True, epoch
                return [Watch(ROUTER, pid)] if host == self.hello.host else []
            case msg.Refused(why):
                return [Stop(4, f"the router refused this worker: {why}")]
            case msg.Reset():  # more than one may come: each old report was answered with one
                return self._renew(now) if self.joined else []
            case msg.Heartbeat(epoch):
                return self._renew(now) if self.joined and epoch != self._router_epoch else []
        return [] if isinstance(message, ORDERS) and not self.joined else None

    def step(self, now: float) -> list[Effect]:
        """Send a heartbeat, or Hello again; notice a silent router."""
        self._steps += 1
        if self.joined and now - self._router_heard >= ROUTER_PATIENCE_S:
            return self._renew(now)
        if now < self._next_beat:
            return []
        self._next_beat = now + (BEAT_S if self.joined else KNOCK_S)
        knock = msg.Heartbeat(self.hello.epoch, self._steps) if self.joined else self.hello
        return [To(ROUTER, knock)]

    def due(self, now: float) -> float:
        """Seconds to the next heartbeat."""
        return max(0.0, self._next_beat - now)

    def _renew(self, now: float) -> list[Effect]:
        self._life += 1
        self.joined = False
        epoch = f"{self.hello.worker}/{self._life}"
        self.hello = replace(self.hello, epoch=epoch, regions=self._start_anew(epoch))
        self._next_beat = now + KNOCK_S
        return [To(ROUTER, self.hello)]
