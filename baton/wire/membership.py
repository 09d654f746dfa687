"""Membership, the same for all worker nodes: joining a router, heartbeats, new epochs.

new -- Hello --> waiting -- Welcome --> joined -- Reset, or the router is gone --> new (next epoch)
                                          |
                                          +-- Terminate: Leaving --> Dismissed, or its time is up --> ends

A worker that leaves finishes what runs there. Without a router there is nothing to finish: it ends.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from math import inf

from baton.kv.region import Region
from baton.wire import messages as msg
from baton.wire.messages import Hello, Message
from baton.wire.node import ROUTER, Effect, Stop, To, Watch
from baton.wire.paces import Paces
from baton.wire.shelf import POLL_S, Keeper, Shelf
from baton.wire.tally import Tally

BEAT_S = 1.0
KNOCK_S = 0.25
ROUTER_PATIENCE_S = 5.0
"""A router that is silent for so long is gone: it has no long steps. On the same host its end is noticed
at once."""

ORDERS = (
    *(msg.Attach, msg.Fill, msg.Reserve, msg.Start, msg.UseAdapters),
    *(msg.WriterClear, msg.WriterJoined),
)
"""Messages that were meant for an older epoch of the worker if they arrive before Welcome. News of a
writer that is older than this epoch says nothing about what it writes now. None is missed: after Welcome
all writers join again, and the loop itself reports those that died."""


class Membership:
    """Keeps one worker in a cluster. `start_anew(epoch)` drops everything of the old epoch and returns
    the regions of the worker's pool in the new one. Heartbeats carry the `tally`, once
    it has counted anything, and the `paces`."""

    def __init__(
        self,
        hello: Hello,
        start_anew: Callable[[str], tuple[Region, ...]],
        tally: Tally | None = None,
        paces: Paces | None = None,
    ) -> None:
        self.hello = hello
        self.keeper = Keeper(hello, None)
        self.tally = tally or Tally()
        self._paces = paces
        self._start_anew = start_anew
        self._life = 0
        self.joined = False  # the router has welcomed this epoch of the worker
        self._router_epoch = ""
        self._router_heard = 0.0
        self._next_beat = 0.0
        self._steps = 0
        self._leaves_by = inf  # when this process ends in any case

    def handle(self, message: Message, now: float) -> list[Effect] | None:
        """Effects of a message about membership or from an older epoch; None for all others."""
        match message:
            case msg.Exited(peer) | msg.Unreachable(peer):
                if peer != ROUTER:
                    return None
                return self._renew(now) if self.joined else []
            case msg.Terminate(within_s):
                return self._leave(within_s, now)
        self._router_heard = now
        match message:
            case msg.Dismissed():
                return [Stop(0, "")] if self._leaves_by < inf else []
            case msg.Welcome(epoch) if self.joined and epoch != self._router_epoch:
                return self._renew(now)
            case msg.Welcome(epoch, host, pid):
                self.joined, self._router_epoch = True, epoch
                return [Watch(ROUTER, pid)] if host == self.hello.host else []
            case msg.Refused(why):
                return [Stop(4, f"the router refused this worker: {why}")]
            case msg.Reset():  # may come more than once: the router answers each old report
                return self._renew(now) if self.joined else []
            case msg.Heartbeat(epoch):
                return self._renew(now) if self.joined and epoch != self._router_epoch else []
        if isinstance(message, ORDERS) and not self.joined:
            return []
        return self.keeper.use(message) if isinstance(message, msg.UseAdapters) else None

    def step(self, now: float) -> list[Effect]:
        """Send a heartbeat, or Hello again. Detect a silent router. Put to use what was read."""
        told = self.keeper.step()
        return (told if self.joined else []) + self._beat(now)

    def _beat(self, now: float) -> list[Effect]:
        self._steps += 1
        if now >= self._leaves_by:
            return [Stop(0, "")]
        if self.joined and now - self._router_heard >= ROUTER_PATIENCE_S:
            return self._renew(now)
        if now < self._next_beat:
            return []
        self._next_beat = now + (BEAT_S if self.joined else KNOCK_S)
        if not self.joined:
            return [To(ROUTER, self.hello)]
        paces = self._paces
        told = (paces.report(), paces.idle, paces.requests) if paces is not None else ()
        beat = msg.Heartbeat(self.hello.epoch, self._steps, self.tally.report(), *told)
        return [To(ROUTER, beat)]

    def due(self, now: float) -> float:
        soon = POLL_S if self.keeper.waits else inf
        return min(soon, max(0.0, min(self._next_beat, self._leaves_by) - now))

    def _leave(self, within_s: float, now: float) -> list[Effect]:
        if not self.joined or within_s <= 0:
            return [Stop(0, "")]
        self._leaves_by = min(self._leaves_by, now + within_s)
        return [To(ROUTER, msg.Leaving(within_s))]

    def _renew(self, now: float) -> list[Effect]:
        if self._leaves_by < inf:
            return [Stop(0, "")]
        self._life += 1
        self.joined = False
        epoch = f"{self.hello.worker}/{self._life}"
        regions = self._start_anew(epoch)
        self.keeper.start_anew()  # what ran is over, so nothing needs what is dropped
        hello = replace(self.hello, changes=self.keeper.changes)
        self.hello = replace(hello, epoch=epoch, regions=regions)
        self._next_beat = now + KNOCK_S
        return [To(ROUTER, self.hello)]


class Worker(ABC):
    """What all worker nodes share: their membership has the first word."""

    __slots__ = ()
    _membership: Membership

    @property
    def held(self) -> Collection[str]:
        """Digests of the adapters that orders may name."""
        return self._membership.keeper.held

    def load_from(self, shelf: Shelf | None) -> None:
        """Adapters come and go on this shelf. To be called before the first step."""
        self._membership.keeper = Keeper(self._membership.hello, shelf)

    @property
    def joined(self) -> bool:
        """Whether a router has taken this worker in."""
        return self._membership.joined

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        effects = self._membership.handle(message, now)
        return self.obey(message, now) if effects is None else effects

    @abstractmethod
    def obey(self, message: Message, now: float) -> list[Effect]:
        """What is left to this kind of worker: its orders."""
