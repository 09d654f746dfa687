"""Courier: opens a link and sends by it in a thread of its own, so that a peer which takes nothing delays
nobody but itself.

    worker's loop                              courier's thread
    -------------                              ----------------
    Courier(open) ---------------------------> open(), then a short probe        Opened, or Lost
    push(grant, layer, ...): copies blocks --> link.push ...                     Lost: the way failed
    finish(grant, blocks) -------------------> link.finish                       Sent(grant, receipt)
    poll(): what has happened since the last call
    close()

The loop never waits here. It looks at `takes` before it computes more for this way: what waits to be sent
is bounded by QUEUE_BYTES and one forward. A way that failed stays so: close it and open another.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, runtime_checkable

import torch
import zmq

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Receipt
from baton.transfer.base import Link
from baton.transfer.checks import check_grant, check_push
from baton.transfer.frame_codec import blocks_per_frame
from baton.transfer.packing import Gathered, Payload
from baton.transfer.pieces import gather, rows

QUEUE_BYTES = 64 << 20


@runtime_checkable
class Watched(Protocol):
    """A link that knows whether what it sent has arrived. Others are lost when push or finish fails."""

    tend_s: float
    """So often the thread looks at it while it has nothing to send and its owner owes it an answer."""

    def tend(self) -> None:
        """Look whether the way still works, without waiting. TransferError if it is lost."""

    def written(self, grant: Grant) -> bool:
        """finish() and abandon() would not have to wait for the owner. Without waiting."""

    @property
    def owed(self) -> bool:
        """The owner has not acknowledged all yet."""

    @property
    def unsure(self) -> tuple[str, ...]:
        """Runs that were finished and have perhaps not arrived. From any thread."""

    @property
    def quiet_since(self) -> float | None:
        """Since when (time.monotonic) the owner has acknowledged nothing; None if it owes nothing."""

    def stop(self, why: str) -> None:
        """From any thread: what waits in this link raises TransferError soon."""

    def pack(
        self, layer: int, slab: torch.Tensor, source: Sequence[int], target: Sequence[int]
    ) -> Payload:
        """A copy of at most blocks_per_frame() blocks, ready to be sent. From any one thread."""

    def drop(self, packed: Payload) -> None:
        """What pack() returned is not pushed."""

    def push_packed(self, grant: Grant, layer: int, packed: Payload, target: Sequence[int]) -> None:
        """As push(), of what pack() returned."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The link works. `gb_per_s` is for people."""

    transport: str
    gb_per_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Sent:
    """All of a fill is on its way."""

    grant: Grant
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Lost:
    """The way failed, or could not be opened. `runs` were sent and have perhaps not arrived."""

    why: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """A fill that was to be finished, and was abandoned before."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Stopped:
    """A fill was abandoned, and nothing of it is being written any more."""

    grant: Grant


News = Opened | Sent | Dropped | Stopped | Lost


@dataclass(frozen=True, slots=True)
class _Push:
    grant: Grant
    layer: int
    packed: Payload
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Finish:
    grant: Grant
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Abandon:
    grant: Grant


@dataclass(frozen=True, slots=True)
class _Look:
    """No order."""


class Courier:
    """One way to one owner. All methods are for one thread, and return at once."""

    def __init__(
        self,
        open_link: Callable[[], Link],
        layout: KVLayout,
        epoch: str,
        *,
        writes: bool = False,
    ) -> None:
        """`open_link` is called in the thread; TransferError says why it fails. `writes`: the link writes
        into the pool by itself, so that it matters when it has stopped."""
        self._open_link, self._layout, self._epoch = open_link, layout, epoch
        self._writes = writes
        self._orders: SimpleQueue[_Push | _Finish | _Abandon | None] = SimpleQueue()
        self._ending: deque[_Finish | _Abandon] = deque()  # of the thread
        self._news: deque[News] = deque()
        self._waiting = 0  # bytes of pushes that are not sent yet
        self._lock = threading.Lock()
        self._abandoned: set[int] = set()  # generations
        self._watched: Watched | None = None
        self._owing = 1  # news that are to come: Opened, then one for each finish()
        self._closed = False
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="kv-courier", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """poll() will have news soon: also while the owner has not acknowledged what was sent, for the
        way may fail."""
        watched = self._watched
        return self._owing > 0 or bool(self._news) or (watched is not None and watched.owed)

    @property
    def takes(self) -> bool:
        """It can be given more."""
        return self._waiting < QUEUE_BYTES

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """As Link.push, later: the blocks are copied now, and may be reused."""
        check_grant(grant, self._epoch, closed=self._closed)
        check_push(grant, self._layout, layer, source, target)
        many, watched = blocks_per_frame(self._layout, layer), self._watched
        for first in range(0, len(source), many):
            some, chosen = source[first : first + many], tuple(target[first : first + many])
            if watched is not None:
                packed = watched.pack(layer, slab, some, chosen)
            else:
                packed = Gathered(gather(rows(self._layout, layer, slab), some))
            with self._lock:
                self._waiting += packed.size
            self._orders.put(_Push(grant, layer, packed, chosen))

    def finish(self, grant: Grant, blocks: Sequence[int]) -> None:
        """As Link.finish, later: Sent will name the receipt."""
        check_grant(grant, self._epoch, closed=self._closed)
        self._owing += 1
        self._orders.put(_Finish(grant, tuple(blocks)))

    def abandon(self, grant: Grant) -> bool:
        """Send nothing more under this grant, but for what is being sent now. True: some of that may
        still be written into the pool, and Stopped or Lost will be told."""
        self._abandoned.add(grant.generation)
        self._owing += self._writes
        self._orders.put(_Abandon(grant))
        return self._writes

    def poll(self) -> list[News]:
        """What has happened since the last call; nothing after Lost or close()."""
        news: list[News] = []
        while self._news and not self._closed and not self._lost:
            news.append(self._news.popleft())
            self._owing -= 1
            self._lost = isinstance(news[-1], Lost)
        return news

    def quiet_s(self) -> float:
        """Seconds since the owner last took something, if it should have."""
        since = self._watched.quiet_since if self._watched else None
        return 0.0 if since is None else time.monotonic() - since

    def give_up(self, why: str) -> None:
        """Take the way for lost: others need what it holds."""
        self._news.appendleft(Lost(why, self._unsure()))
        self._stop(why)

    def close(self) -> None:
        """Drop what waits. The thread ends by itself, half a second later at most once it is
        connected."""
        self._closed = True
        self._stop("the link is closed")

    def join(self, within_s: float) -> None:
        """After close(): wait until what was sent has left this process, so long at most."""
        self._thread.join(within_s)

    def _stop(self, why: str) -> None:
        if self._watched is not None:
            self._watched.stop(why)
        self._orders.put(None)

    def _unsure(self) -> tuple[str, ...]:
        return self._watched.unsure if self._watched else ()

    # ---- the thread

    def _run(self) -> None:
        link: Link | None = None
        why = "the thread that sends ended by an error, see the log"
        try:
            link = self._open_link()
            self._watched = link if isinstance(link, Watched) else None
            self._news.append(Opened(link.transport, link.probe(), link.why))
            self._serve(link)
        except (TransferError, zmq.ZMQError) as error:
            why = str(error)
        finally:
            self._news.append(Lost(why, self._unsure()))
            if link is not None:
                link.close()

    def _serve(self, link: Link) -> None:
        while not self._closed:
            match self._next():
                case None:
                    return
                case _Push() as push:
                    if push.grant.generation not in self._abandoned:
                        self._send(link, push)
                    elif self._watched is not None and not isinstance(push.packed, Gathered):
                        self._watched.drop(push.packed)
                    with self._lock:
                        self._waiting -= push.packed.size
                case _Finish() | _Abandon() as order:
                    self._ending.append(order)
            self._end(link)

    def _end(self, link: Link) -> None:
        """Finish and abandon what need not be waited for, in order: other fills go on meanwhile."""
        while self._ending and (
            self._watched is None or self._watched.written(self._ending[0].grant)
        ):
            match self._ending.popleft():
                case _Finish(grant, blocks):
                    if grant.generation not in self._abandoned:
                        self._news.append(Sent(grant, link.finish(grant, blocks)))
                    else:
                        self._news.append(Dropped(grant))
                case _Abandon(grant):
                    link.abandon(grant)
                    self._abandoned.discard(grant.generation)
                    if self._writes:
                        self._news.append(Stopped(grant))

    def _send(self, link: Link, push: _Push) -> None:
        packed, copied = push.packed, range(len(push.target))
        if isinstance(packed, Gathered):  # before the link was open, or it packs nothing
            link.push(push.grant, push.layer, packed.payload, copied, push.target)
        elif self._watched is not None:
            self._watched.push_packed(push.grant, push.layer, packed, push.target)

    def _next(self) -> _Push | _Finish | _Abandon | _Look | None:
        """The next order. Waits for it; instead it may be time to look after the link."""
        watched = self._watched
        try:
            soon = watched is not None and (watched.owed or bool(self._ending))
            return self._orders.get(timeout=watched.tend_s if watched and soon else None)
        except Empty:
            assert watched is not None
            watched.tend()
            return _Look()
