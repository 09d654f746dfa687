"""RequestTracker: a client's requests, from submission to outcome. No sockets, no clock.

    tracker.submit(Submit)          -> messages_to_send(): Submit
    tracker.received(Emitted, now)  -> Update(request, Emitted)
    tracker.connection_lost(now)    -> RouterLost; then GetClusterInfo until a router answers
    tracker.received(ClusterInfo)   -> Submit again under a new id, Resubmitted

Every request ends with exactly one Finished or Failed, unless the caller forgets it. A router that
is lost loses its requests, so they are submitted again. Since a token is a function of (seed,
position), the new attempt produces the same tokens and text, and the tracker skips what an earlier
attempt has delivered: the caller sees one uninterrupted stream.

Call messages_to_send() after every other call, and send what it returns together: the router fills
requests that arrive together as one batch. Where sending fails, pass them to connection_lost().
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

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
    PromptScored,
    Submit,
    Unreachable,
)
from baton.wire.records import Timings

News = Accepted | PromptScored | Emitted | Finished | Failed

INQUIRE_S = 1.0  # between two GetClusterInfo messages while the router is lost
SILENCE_S = 10.0  # a router that sends nothing for so long is sent an GetClusterInfo ...
ANSWER_S = 30.0  # ... and counts as lost if it does not answer within this time


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One request. `context` is the caller's own; the tracker does not look at it."""

    submit: Submit
    context: Any = None
    attempt: int = 0
    sent: bool = False  # the router has been sent the Submit of this attempt
    accepted: bool = False
    scored: bool = False
    started: bool = False  # its first token has arrived
    aborted: bool = False
    ended: bool = False
    tokens: int = 0  # delivered to the caller
    characters: int = 0
    skip_tokens: int = 0  # of this attempt, because an earlier one has delivered them
    skip_characters: int = 0

    @property
    def id(self) -> str:
        """The id under which the caller submitted it; every event carries it."""
        return self.submit.request

    @property
    def attempt_id(self) -> str:
        """The current attempt's request id at the router."""
        return f"{self.id}.{self.attempt}" if self.attempt else self.id

    def next_attempt(self) -> None:
        """Start over with the router, skipping what has been delivered."""
        self.attempt += 1
        self.sent = False
        self.skip_tokens, self.skip_characters = self.tokens, self.characters

    def fresh(self, news: News) -> News | None:
        """The part of `news` that the caller does not have yet, under the caller's id."""
        match news:
            case Accepted() if self.accepted:
                return None
            case Accepted():
                self.accepted = True
            case PromptScored() if self.scored:
                return None
            case PromptScored():
                self.scored = True
            case Emitted():
                self.started = True
                if self.skip_tokens or self.skip_characters:
                    news = self._skip(news)
                    if not news.token_ids and not news.text:
                        return None
                self.tokens += len(news.token_ids)
                self.characters += len(news.text)
        return replace(news, request=self.id) if self.attempt else news

    def _skip(self, news: Emitted) -> Emitted:
        tokens = min(self.skip_tokens, len(news.token_ids))
        characters = min(self.skip_characters, len(news.text))
        self.skip_tokens -= tokens
        self.skip_characters -= characters
        return replace(
            news,
            token_ids=news.token_ids[tokens:],
            text=news.text[characters:],
            logprobs=news.logprobs[tokens:],
            ages=news.ages[tokens:],
        )


@dataclass(frozen=True, slots=True)
class Update:
    """Something new about a request. `news.request` is the id the caller chose."""

    request: PendingRequest
    news: News


@dataclass(frozen=True, slots=True)
class RouterLost:
    """The connection was cut, or the router stopped answering. Requests wait for the next one."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resubmitted:
    """A router answers again, and has been sent these many requests of the lost one."""

    requests: int


Event = Update | RouterLost | Resubmitted | ClusterInfo


class RequestTracker:
    """Starts as if a router had just been lost: the first ClusterInfo connects it. Times are in
    seconds, on any clock that never goes back."""

    def __init__(self, now: float, *, give_up_s: float = inf, observe: bool = False) -> None:
        """`give_up_s`: requests fail with code not_ready when no router has answered for so long.
        `observe`: also subscribe to Observed, the events of all requests of the router."""
        self.info: ClusterInfo | None = None  # None while no router answers
        self.lost_since: float | None = now
        self.losses = 0
        self._give_up_s = give_up_s
        self._greeting: list[Message] = (
            [GetClusterInfo(), Observe()] if observe else [GetClusterInfo()]
        )
        self._requests: dict[str, PendingRequest] = {}  # by the id of the current attempt
        self._outgoing: list[Message] = []
        self._orphans: list[str] = []  # attempts to abort as soon as a router answers
        self._heard = self._inquired = -inf

    # ---- requests

    def submit(self, submit: Submit, context: Any = None) -> PendingRequest:
        """Track a new request. It is sent at once, or when a router answers."""
        request = PendingRequest(submit, context)
        self._requests[request.attempt_id] = request
        if self.lost_since is None:
            self._send(request)
        return request

    def abort(self, request: PendingRequest) -> list[Event]:
        """End a request. The router answers with Finished(reason="abort") and its timings; where there
        is no router to answer, the tracker does."""
        if request.ended or request.aborted:
            return []
        request.aborted = True
        if self.lost_since is not None:
            return [self._end_aborted(request)]
        self._outgoing.append(Abort(request.attempt_id))
        return []

    def forget(self, request: PendingRequest) -> None:
        """Abort a request, with no further events. Does nothing if it has ended."""
        request.ended = True
        if self._requests.pop(request.attempt_id, None) is not None and request.sent:
            self._abort(request.attempt_id)

    def fail_all(self, code: str, message: str) -> list[Event]:
        """Fail every request."""
        requests = list(self._requests.values())
        for request in requests:
            self.forget(request)
        return [Update(each, Failed(each.id, code, message)) for each in requests]

    @property
    def waiting(self) -> int:
        """How many requests have no token yet."""
        return sum(not each.started for each in self._requests.values())

    def __len__(self) -> int:
        return len(self._requests)

    # ---- the connection

    def messages_to_send(self) -> list[Message]:
        """Everything to send now, in this order."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def inquire(self, now: float) -> None:
        """Ask the router for its ClusterInfo."""
        self._inquired = now
        self._outgoing += self._greeting

    def received(self, message: Message, now: float) -> list[Event]:
        """Take in a message of the router. Messages that are none of a tracker's are ignored."""
        self._heard = now
        match message:
            case Emissions(emitted):
                return [event for each in emitted for event in self._deliver(each)]
            case Accepted() | PromptScored() | Emitted() | Finished() | Failed():
                return self._deliver(message)
            case ClusterInfo():
                self.info = message
                return [*self._resubmit(), message]
            case Unreachable():
                return self.connection_lost(now, "the connection was cut")
        return []

    def connection_lost(
        self, now: float, reason: str, unsent: Sequence[Message] = ()
    ) -> list[Event]:
        """What was under way is lost. `unsent`: messages that could not be sent."""
        for message in (*unsent, *self.messages_to_send()):
            if isinstance(message, Abort):
                self._orphans.append(message.request)
        self._inquired = -inf
        if self.lost_since is not None:
            return []
        self.lost_since, self.info = now, None
        self.losses += 1
        aborted = [each for each in self._requests.values() if each.aborted]
        return [RouterLost(reason), *map(self._end_aborted, aborted)]

    def tick(self, now: float) -> list[Event]:
        """Call it several times a second, after all that has arrived was passed to received()."""
        if self.lost_since is not None:
            if now >= self._inquired + INQUIRE_S:  # for ever: a router may come back after any time
                self.inquire(now)
            if now >= self.lost_since + self._give_up_s:
                why = f"no router has answered for {self._give_up_s:.0f} s"
                return self.fail_all("not_ready", why)
        elif self._inquired <= self._heard:
            if now >= self._heard + SILENCE_S:
                self.inquire(now)
        elif now >= self._inquired + ANSWER_S:
            return self.connection_lost(now, "it has stopped answering")
        return []

    # ---- inside

    def _send(self, request: PendingRequest) -> None:
        request.sent = True
        self._outgoing.append(replace(request.submit, request=request.attempt_id))

    def _abort(self, attempt_id: str) -> None:
        if self.lost_since is None:
            self._outgoing.append(Abort(attempt_id))
        else:
            self._orphans.append(attempt_id)

    def _deliver(self, news: News) -> list[Event]:
        request = self._requests.get(news.request)
        if request is None:
            if isinstance(news, Accepted):  # an old attempt that this router still works on
                self._abort(news.request)
            return []
        if isinstance(news, Finished | Failed):
            del self._requests[news.request]
            request.ended = True
        fresh = request.fresh(news)
        return [] if fresh is None else [Update(request, fresh)]

    def _end_aborted(self, request: PendingRequest) -> Update:
        self.forget(request)
        return Update(request, Finished(request.id, "abort", Timings()))

    def _resubmit(self) -> list[Event]:
        if self.lost_since is None:
            return []
        self.lost_since = None
        lost = [each for each in self._requests.values() if each.sent]
        # If only the connection was cut, it is the same router, and the old attempts still run.
        orphans, self._orphans = self._orphans, []
        self._outgoing += map(Abort, (*orphans, *(each.attempt_id for each in lost)))
        for each in lost:
            each.next_attempt()
        requests = list(self._requests.values())
        self._requests = {each.attempt_id: each for each in requests}
        for each in requests:
            self._send(each)
        return [Resubmitted(len(lost))] if lost else []
