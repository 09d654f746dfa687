"""Line: the server's one connection to the router, for many requests of one event loop.

    flight = line.open(submit, box)     the request is on its way
    flight, news = await box.get()      Accepted, PromptScored, Emitted ..., then a Finished or Failed
    line.abort(flight)                  nobody waits for it any more

A router that is lost takes what it knew with it; a new one is asked again, and as a token is a function
of the request and its position alone, the stream goes on where it stopped: what the client has is left
out the second time.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from baton.clock import monotonic
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
    Message,
    Observe,
    Observed,
    PromptScored,
    Submit,
    Unreachable,
)
from baton.wire.node import ROUTER

News = Accepted | PromptScored | Emitted | Finished | Failed

TICK_S = 0.25
ASK_S = 1.0
SILENCE_S = 10.0
"""A router of which nothing was heard for so long is asked whether it is there."""
LOST_S = 30.0
"""Requests wait so long for a router that is lost, then they fail."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Flight:
    """One request with the router. Its news come to `box`, where others' may come too."""

    submit: Submit
    box: "Box"
    attempt: int = 0
    accepted: bool = False
    scored: bool = False
    ended: bool = False
    talks: bool = False  # its first token has come
    token_ids: list[int] = field(default_factory=list)
    characters: int = 0  # of text passed on
    skip_tokens: int = 0  # of this attempt, which an earlier one had passed on
    skip_characters: int = 0

    @property
    def name(self) -> str:
        """As the router knows it."""
        return self.submit.request + (f".{self.attempt}" if self.attempt else "")

    def put(self, news: News) -> None:
        """For the line: something has come."""
        match news:
            case Accepted():
                if self.accepted:
                    return
                self.accepted = True
            case PromptScored():
                if self.scored:
                    return
                self.scored = True
            case Emitted():
                rest = self._new(news)
                if rest is None:
                    return
                news = rest
            case _:
                self.ended = True
        self.box.put_nowait((self, news))

    def again(self) -> None:
        """The router that had it is gone: it will be asked for from the beginning."""
        self.attempt += 1
        self.skip_tokens, self.skip_characters = len(self.token_ids), self.characters

    def _new(self, news: Emitted) -> Emitted | None:
        """What of it has not been passed on by an earlier attempt."""
        self.talks = True
        if not self.skip_tokens and not self.skip_characters:
            self.token_ids += news.token_ids
            self.characters += len(news.text)
            return news
        repeated = min(self.skip_tokens, len(news.token_ids))
        known = min(self.skip_characters, len(news.text))
        self.skip_tokens -= repeated
        self.skip_characters -= known
        fresh = replace(
            news,
            token_ids=news.token_ids[repeated:],
            text=news.text[known:],
            logprobs=news.logprobs[repeated:],
            ages=news.ages[repeated:],
        )
        self.token_ids += fresh.token_ids
        self.characters += len(fresh.text)
        return fresh if fresh.token_ids or fresh.text else None


Box = asyncio.Queue[tuple[Flight, News]]


class Line:
    """Open it inside a running event loop; close it there."""

    def __init__(self, address: str, *, keys: ClusterKeys | None = None) -> None:
        self.address = address
        self.info: ClusterInfo | None = None  # None: no router answers
        self.restarts = 0  # routers lost
        self._keys = keys
        self._channel: Dialer | None = None
        self._flights: dict[str, Flight] = {}
        self._observe: Callable[[Observed], None] | None = None
        self._there = asyncio.Event()
        self._waiting = False  # for the answer of a router: flights are not with anybody
        self._heard = self._asked = self._lost_at = 0.0
        self._tick: asyncio.TimerHandle | None = None

    def open_up(self, observe: Callable[[Observed], None] | None = None) -> None:
        """Connect. `observe` is called with all that happens to any request."""
        self._observe = observe
        self._channel = Dialer(f"server.{secrets.token_hex(4)}", self.address, self._keys)
        asyncio.get_running_loop().add_reader(self._channel.socket.fileno(), self._drain)
        self._waiting, self._lost_at = True, monotonic()
        self._on_tick()

    def close(self) -> None:
        """Leave: the router withdraws what is still running."""
        if self._tick is not None:
            self._tick.cancel()
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel.socket.fileno())
            self._channel.close(linger_s=0.2)
            self._channel = None

    async def answered(self, patience_s: float) -> ClusterInfo | None:
        """What the router serves, as soon as there is one, within so long."""
        if self.info is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._there.wait(), patience_s)
        return self.info

    # ---- requests

    def open(self, submit: Submit, box: Box) -> Flight:
        """Send a request; at once, or when there is a router again."""
        flight = Flight(submit, box)
        self._flights[flight.name] = flight
        if not self._waiting:
            self._send(submit)
        return flight

    def abort(self, flight: Flight) -> None:
        """Nobody waits for it any more. Does nothing to one that has ended."""
        if self._flights.pop(flight.name, None) is not None:
            self._send(Abort(flight.name))

    def fail_all(self, code: str, why: str) -> None:
        """Every request ends now."""
        for flight in list(self._flights.values()):
            self.abort(flight)
            flight.put(Failed(flight.name, code, why))

    @property
    def waiting(self) -> int:
        """Requests that have no token yet."""
        return sum(not flight.talks for flight in self._flights.values())

    def __len__(self) -> int:
        return len(self._flights)

    # ---- the socket

    def _send(self, message: Message) -> None:
        if self._channel is None:
            return
        if not self._channel.send(ROUTER, message):
            self._lose("it takes no messages")
        # ZeroMQ signals once for what arrives while we send.
        asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        if self._channel is None:
            return
        for _, messages in self._channel.receive():
            for message in messages:
                self._take(message)

    def _take(self, message: Message) -> None:
        self._heard = monotonic()
        match message:
            case Unreachable():
                self._lose("the connection was cut")
            case ClusterInfo():
                self.info = message
                self._there.set()
                self._found()
            case Observed():
                if self._observe is not None:
                    self._observe(message)
            case Emissions(emitted):
                for each in emitted:
                    self._pass_on(each)
            case Accepted() | PromptScored() | Emitted() | Finished() | Failed():
                self._pass_on(message)

    def _pass_on(self, news: News) -> None:
        flight = self._flights.get(news.request)
        if flight is None:
            if isinstance(news, Accepted):
                self._send(Abort(news.request))
            return
        if isinstance(news, Finished | Failed):
            del self._flights[news.request]
        flight.put(news)

    # ---- is there a router?

    def _on_tick(self) -> None:
        now = monotonic()
        self._drain()
        if self._waiting and now >= self._asked + ASK_S:
            self._ask(now)
        elif not self._waiting and now >= self._heard + SILENCE_S + LOST_S:
            self._lose("it says nothing any more")
        elif not self._waiting and now >= max(self._heard, self._asked) + SILENCE_S:
            self._ask(now)
        if self._waiting and now >= self._lost_at + LOST_S:
            self.fail_all("not_ready", f"no router has answered for {LOST_S:.0f} s")
        self._tick = asyncio.get_running_loop().call_later(TICK_S, self._on_tick)

    def _ask(self, now: float) -> None:
        """Not by _send(): nothing is lost if it does not go out."""
        if self._channel is not None and self._channel.send(ROUTER, GetClusterInfo()):
            self._asked = now
            if self._observe is not None:
                self._channel.send(ROUTER, Observe())

    def _lose(self, why: str) -> None:
        if self._waiting:
            return
        logger.warning("the router is lost: %s; %d requests wait", why, len(self._flights))
        self._waiting, self._lost_at, self._asked = True, monotonic(), 0.0
        self.restarts += 1
        self.info = None
        self._there.clear()

    def _found(self) -> None:
        if not self._waiting:
            return
        self._waiting = False
        flights, self._flights = list(self._flights.values()), {}
        for flight in flights:
            if flight.accepted:  # the same router, perhaps, if only the connection was cut
                self._send(Abort(flight.name))
            flight.again()
            self._flights[flight.name] = flight
            self._send(replace(flight.submit, request=flight.name))
