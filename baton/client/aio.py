"""RouterClient: the HTTP server's connection to its router, for many requests of one event loop.

    request = client.submit(submit, queue)
    request, news = await queue.get()       Accepted, PromptScored, Emitted ..., then Finished or Failed
    client.abort(request)                   no further news

What happens when the router is lost: baton/client/tracker.py.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress

from baton.client.attempts import Attempts
from baton.client.tracker import Event, News, PendingRequest, RequestTracker, RouterLost, Update
from baton.client.unreported import Unreported
from baton.clock import monotonic
from baton.wire.channel import Dialer
from baton.wire.keys import ClusterKeys
from baton.wire.messages import (
    AdapterChanged,
    ClusterInfo,
    Failed,
    Finished,
    LoadAdapter,
    Observed,
    Submit,
    UnloadAdapter,
)
from baton.wire.node import ROUTER

TICK_S = 0.25
GIVE_UP_S = 30.0  # requests wait so long for a lost router, then they fail
LOST = "the router was lost meanwhile: it is perhaps done, and /v1/models tells"

Queue = asyncio.Queue[tuple[PendingRequest, News]]

logger = logging.getLogger(__name__)


class RouterClient:
    """Connect it inside a running event loop; close it there."""

    def __init__(self, address: str, *, keys: ClusterKeys | None = None) -> None:
        self.address = address
        self._keys = keys
        self._tracker = RequestTracker(0.0)
        self._channel: Dialer | None = None
        self._observe: Callable[[Observed], None] | None = None
        self._alone: Callable[[str, str], None] | None = None
        self._answered = asyncio.Event()
        self._unreported = Unreported()
        self._all_reported = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._changing: dict[str, asyncio.Future[AdapterChanged]] = {}  # by request

    def connect(
        self,
        observe: Callable[[Observed], None] | None = None,
        alone: Callable[[str, str], None] | None = None,
    ) -> None:
        """`observe` is called with the events of all requests of the router. `alone`: with the id and
        the reason of each request of this client that ends while no router answers."""
        self._observe, self._alone = observe, alone
        self._tracker = RequestTracker(
            monotonic(), give_up_s=GIVE_UP_S, observe=observe is not None
        )
        self._channel = Dialer(f"server.{secrets.token_hex(4)}", self.address, self._keys)
        asyncio.get_running_loop().add_reader(self._channel.socket.fileno(), self._receive)
        self._tick()

    def close(self) -> None:
        """Disconnect: the router withdraws what is still running."""
        if self._timer is not None:
            self._timer.cancel()
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.socket.fileno())
            self._channel.close(linger_s=0.2)
            self._channel = None

    @property
    def info(self) -> ClusterInfo | None:
        """What the router serves; None while no router answers."""
        return self._tracker.info

    @property
    def restarts(self) -> int:
        """How many routers were lost."""
        return self._tracker.losses

    @property
    def attempts(self) -> Attempts:
        """Which ids at the router belong to one request."""
        return self._tracker.attempts

    @property
    def live(self) -> set[str]:
        """The requests under way, by the ids of their first attempts."""
        return self._tracker.live

    async def answered(self, timeout_s: float) -> ClusterInfo | None:
        """What the router serves, as soon as one answers; None after `timeout_s`."""
        if self.info is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._answered.wait(), timeout_s)
        return self.info

    async def reported(self, timeout_s: float) -> int:
        """Wait until observers have been told the end of every request that the router has accepted, for
        `timeout_s` at most. How many are missing. Call it when no request is under way."""
        if self._unreported:
            self._all_reported.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._all_reported.wait(), timeout_s)
        return len(self._unreported)

    async def change(self, asked: LoadAdapter | UnloadAdapter) -> AdapterChanged:
        """Load or unload an adapter. `info` tells of it when this returns. What a lost router was asked
        has perhaps been done."""
        if self._channel is None or self._tracker.lost_since is not None:
            return AdapterChanged(asked.request, "not_ready", "no router answers")
        answer: asyncio.Future[AdapterChanged] = asyncio.get_running_loop().create_future()
        self._changing[asked.request] = answer
        try:
            if not self._channel.send(ROUTER, asked):
                return AdapterChanged(asked.request, "not_ready", "no router answers")
            asyncio.get_running_loop().call_soon(self._receive)
            return await answer
        finally:
            del self._changing[asked.request]

    # ---- requests

    def submit(self, submit: Submit, queue: Queue) -> PendingRequest:
        """Send a request, at once or when there is a router. Its news arrive in `queue`."""
        request = self._tracker.submit(submit, queue, now=monotonic())
        self._send()
        return request

    def abort(self, request: PendingRequest) -> None:
        """End a request, with no further news. Does nothing if it has ended."""
        if not request.ended and self._tracker.lost_since is not None:
            self._ends(request, "abort")
        self._tracker.forget(request)
        self._send()

    def fail_all(self, code: str, message: str) -> None:
        """Fail every request now."""
        alone = self._tracker.lost_since is not None
        self._pass_on(self._tracker.fail_all(code, message), alone=alone)
        self._send()

    @property
    def waiting(self) -> int:
        """How many requests have no token yet."""
        return self._tracker.waiting

    def __len__(self) -> int:
        return len(self._tracker)

    # ---- the socket

    def _send(self) -> None:
        messages = self._tracker.messages_to_send()
        if self._channel is None or not messages:
            return
        if not self._channel.send(ROUTER, *messages):
            why = "it takes no messages"
            self._pass_on(self._tracker.connection_lost(monotonic(), why, messages))
        # ZeroMQ does not signal again for what arrived while this was sent.
        asyncio.get_running_loop().call_soon(self._receive)

    def _receive(self) -> None:
        if self._channel is None:
            return
        for _, messages in self._channel.receive():
            for message in messages:
                if self._observe is not None:
                    if isinstance(message, Observed):
                        self._observe(message)
                    self._unreported.received(message)
                lost = self._tracker.lost_since is not None and isinstance(message, ClusterInfo)
                self._pass_on(self._tracker.received(message, monotonic()), alone=lost)
        if not self._unreported:
            self._all_reported.set()
        self._send()

    def _tick(self) -> None:
        self._receive()
        events = self._tracker.tick(monotonic())
        self._pass_on(events, alone=self._tracker.lost_since is not None)
        self._send()
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _changed(self, request: str, event: AdapterChanged) -> None:
        answer = self._changing.get(request)
        if answer is not None and not answer.done():
            answer.set_result(event)

    def _ends(self, request: PendingRequest, reason: str) -> None:
        if self._alone is not None:
            self._alone(request.id, reason)

    def _pass_on(self, events: Sequence[Event], *, alone: bool = False) -> None:
        """`alone`: no router answers, or none did until now."""
        for event in events:
            match event:
                case Update(request, news):
                    if alone and isinstance(news, Failed):
                        self._ends(request, news.code)
                    elif alone and isinstance(news, Finished):
                        self._ends(request, news.reason)
                    request.context.put_nowait((request, news))
                case ClusterInfo():
                    self._answered.set()
                case AdapterChanged(request):
                    self._changed(request, event)
                case RouterLost(reason):
                    self._answered.clear()
                    for request in list(self._changing):
                        self._changed(request, AdapterChanged(request, "not_ready", LOST))
                    self._unreported.lost()
                    self._all_reported.set()
                    logger.warning(
                        "the router is lost: %s; %d requests wait", reason, len(self._tracker)
                    )
