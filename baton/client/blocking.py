"""Client: one router, as seen by the offline job, the library call, a test. Blocking, one thread."""

import secrets
import time
from collections.abc import Callable

import zmq

from baton.errors import ProtocolError
from baton.wire.channel import Dialer
from baton.wire.keys import ClusterKeys
from baton.wire.messages import (
    Abort,
    Accepted,
    ClusterInfo,
    Emissions,
    Emitted,
    Failed,
    Finished,
    GetClusterInfo,
    Observe,
    Observed,
    Submit,
    Unreachable,
)
from baton.wire.node import ROUTER

News = Accepted | Emitted | Finished | Failed | ClusterInfo

KNOCK_S = 0.05
SEND_DEADLINE_S = 10.0


class Client:
    """Submit requests, poll for what becomes of them."""

    def __init__(
        self,
        address: str,
        *,
        keys: ClusterKeys | None = None,
        observe: Callable[[Observed], None] | None = None,
    ) -> None:
        """`observe` is called with what happens to any request of the router."""
        self.address = address
        self._observe = observe
        self._channel = Dialer(f"client.{secrets.token_hex(4)}", address, keys)
        self._poller = zmq.Poller()
        self._poller.register(self._channel.socket, zmq.POLLIN)
        self._kept: list[News] = []
        self.losses = 0  # how often the connection was cut: what was on its way then is gone

    def info(self, *, timeout_s: float) -> ClusterInfo:
        """What the router serves now, and by whom; later changes come through poll(). Raises
        ProtocolError if no router answers in time."""
        deadline = time.monotonic() + timeout_s
        asked = 0.0
        while (now := time.monotonic()) < deadline:
            if now >= asked + 1.0 and self._channel.send(ROUTER, GetClusterInfo()):
                asked = now
                if self._observe is not None:
                    self._channel.send(ROUTER, Observe())
            for news in self._receive(KNOCK_S):
                if isinstance(news, ClusterInfo):
                    return news
                self._kept.append(news)
        raise ProtocolError(
            f"no router answers at {self.address} within {timeout_s:g} s; start one with "
            f"`python -m router --address {self.address}` or check --router and --keys"
        )

    def submit(self, *requests: Submit) -> None:
        """Send requests, together: the router fills them as one batch if it can. The Accepted or
        Failed of each comes through poll()."""
        self._send(*requests)

    def abort(self, request: str) -> None:
        """Take a request back; it ends with Finished(reason="abort")."""
        self._send(Abort(request))

    def poll(self, timeout_s: float) -> list[News]:
        """What has arrived; waits up to `timeout_s` for the first. Empty if nothing came."""
        if self._kept:
            kept, self._kept = self._kept, []
            return kept
        return self._receive(timeout_s)

    def close(self) -> None:
        """Leave. The router withdraws what this client still had running when it next hears of it:
        abort first if that matters."""
        self._channel.close(linger_s=0.2)

    def _send(self, *messages: Submit | Abort) -> None:
        deadline = time.monotonic() + SEND_DEADLINE_S
        while not self._channel.send(ROUTER, *messages):
            if time.monotonic() >= deadline:
                raise ProtocolError(f"the router at {self.address} takes no messages any more")
            self._channel.socket.poll(int(KNOCK_S * 1000), zmq.POLLOUT)

    def _receive(self, timeout_s: float) -> list[News]:
        if not self._poller.poll(int(timeout_s * 1000)):
            return []
        received = [message for _, together in self._channel.receive() for message in together]
        self.losses += sum(isinstance(message, Unreachable) for message in received)
        news: list[News] = []
        for message in received:
            if isinstance(message, Emissions):
                news += message.emitted
            elif isinstance(message, Observed) and self._observe is not None:
                self._observe(message)
            elif isinstance(message, News):
                news.append(message)
        return news
