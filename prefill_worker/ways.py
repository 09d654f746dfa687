"""Ways: a prefill worker's links to the pools of decode workers. One whose owner may have to be waited
for is a Courier; what becomes of it is told by poll()."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.errors import TransferError
from baton.kv.region import Region
from baton.transfer import courier
from baton.transfer.base import Link
from baton.transfer.courier import Courier, Lost, Opened
from baton.wire.messages import Attached, AttachFailed, WayLost
from prefill_worker.model import News, Sent, Stopped

OpenWay = Callable[[str, str, Sequence[Region]], Link | Courier]
"""Decode worker, its epoch, its pool's regions -> a link. TransferError if no transport works."""

LEAVE_S = 1.0
PINCHED_S = 2.0
"""So long an owner may take nothing while other prompts wait for the room that its own take up."""


@dataclass(slots=True)
class _Way:
    epoch: str
    link: Link | Courier
    opened: bool


class Ways:
    """By decode worker."""

    def __init__(self, open_way: OpenWay) -> None:
        self._open = open_way
        self._ways: dict[str, _Way] = {}

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> Attached | None:
        """Open a way, closing an older one. None: poll() will tell. TransferError if none works."""
        self.detach(worker)
        link = self._open(worker, epoch, regions)
        self._ways[worker] = _Way(epoch, link, not isinstance(link, Courier))
        if isinstance(link, Courier):
            return None
        return Attached(worker, epoch, link.transport, link.probe(), link.why)

    def detach(self, worker: str) -> None:
        """Close the way, if there is one."""
        if (way := self._ways.pop(worker, None)) is not None:
            way.link.close()

    def close(self) -> None:
        """Close all, and give what is sent a second to leave this process."""
        couriers = [way.link for way in self._ways.values() if isinstance(way.link, Courier)]
        for worker in list(self._ways):
            self.detach(worker)
        until = time.monotonic() + LEAVE_S
        for each in couriers:
            each.join(max(0.0, until - time.monotonic()))

    def get(self, worker: str) -> Link | Courier | None:
        """The way to this worker, if it is open."""
        way = self._ways.get(worker)
        return way.link if way is not None and way.opened else None

    def to(self, worker: str) -> Link | Courier:
        """The same. TransferError if there is none."""
        if (link := self.get(worker)) is None:
            raise TransferError(f"there is no link to {worker}: it is gone, or was never attached")
        return link

    def takes(self, worker: str) -> bool:
        """The way can be given more now."""
        link = self.get(worker)
        return link.takes if isinstance(link, Courier) else True

    @property
    def busy(self) -> bool:
        """poll() may tell something soon."""
        couriers = (w.link for w in self._ways.values() if isinstance(w.link, Courier))
        return any(courier.busy for courier in couriers)

    def make_room(self) -> None:
        """Others need what the prompts for these owners take up: give up those that take nothing."""
        for worker, way in self._ways.items():
            if isinstance(way.link, Courier) and way.link.quiet_s() >= PINCHED_S:
                why = f"{worker} took nothing for {PINCHED_S:g} s, and other prompts wait for room"
                way.link.give_up(why)

    def poll(self) -> list[News]:
        """What became of the ways since the last call."""
        news: list[News] = []
        for worker, way in list(self._ways.items()):
            if not isinstance(way.link, Courier):
                continue
            for each in way.link.poll():
                match each:
                    case Opened(transport, gb_per_s, why):
                        way.opened = True
                        news.append(Attached(worker, way.epoch, transport, gb_per_s, why))
                    case courier.Sent(grant, receipt):
                        news.append(Sent(grant.run, receipt))
                    case courier.Stopped(grant):
                        news.append(Stopped(grant.run))
                    case Lost(why, runs):
                        news.append(
                            WayLost(worker, way.epoch, why, runs)
                            if way.opened
                            else AttachFailed(worker, way.epoch, why)
                        )
                        self.detach(worker)
        return news
