"""RequestTracker: a client's requests, from submission to outcome. No sockets, no clock.

    tracker.submit(Submit, now=now) -> messages_to_send(): Submit
    tracker.received(Emitted, now)  -> Update(request, Emitted)
    tracker.connection_lost(now)    -> RouterLost; then GetClusterInfo until a router answers
    tracker.received(ClusterInfo)   -> Submit again under a new id, Resubmitted

Every request ends with exactly one Finished or Failed, unless the caller forgets it. A router that
is lost loses its requests, so they are submitted again. Since a token is a function of (seed,
position), the new attempt produces the same tokens and text, and the tracker skips what an earlier
attempt has delivered: the caller sees one uninterrupted stream. Its deadlines go on: the next router is
sent the time that is left, and while none answers the tracker ends what is overdue.

Call messages_to_send() after every other call, and send what it returns together: the router fills
requests that arrive together as one batch. Where sending fails, pass them to connection_lost().
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

from baton.adapters.changes import NONE
from baton.client.attempts import Attempts
from baton.wire.messages import (
    Abort,
    Accepted,
    AdapterChanged,
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
QUIET_S = 2.0  # a router that is silent for so long may be stalled: deadlines are watched here, too
FORGOTTEN = 4096  # ids of forgotten requests that are remembered
REASONS = ("length", "stop", "abort")  # of Finished
TIMINGS = [field.name for field in fields(Timings)]


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One request. `context` is the caller's own; the tracker does not look at it."""

    submit: Submit
    context: Any = None
    attempt: int = 0
    submitted: float = 0.0  # when the caller did
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
    placed_by: float = inf  # when its queue timeout is over
    ended_by: float = inf  # when its timeout is over

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

    def for_router(self, now: float) -> Submit:
        """The Submit of this attempt, with the time that is left."""
        submit = self.submit
        changed: dict[str, Any] = {"request": self.attempt_id} if self.attempt else {}
        if submit.queue_timeout_s > 0:
            changed["queue_timeout_s"] = _left(self.placed_by, now, submit.queue_timeout_s)
        if submit.timeout_s > 0:
            changed["timeout_s"] = _left(self.ended_by, now, submit.timeout_s)
        return replace(submit, **changed) if changed else submit

    def queued_again(self, now: float) -> None:
        """Its router is lost. If it had been placed, its queue timeout begins anew."""
        wait = self.submit.queue_timeout_s
        if wait > 0 and self.sent and (self.started or now >= self.placed_by):
            self.placed_by = now + wait

    @property
    def too_late(self) -> Failed:
        """It did not end in time."""
        count = f"{self.tokens} {'token was' if self.tokens == 1 else 'tokens were'} sent"
        why = f"the request did not end within {self.submit.timeout_s:g} s; {count}"
        return Failed(self.id, "deadline_exceeded", why)

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


Event = Update | RouterLost | Resubmitted | ClusterInfo | AdapterChanged


class RequestTracker:
    """Starts as if a router had just been lost: the first ClusterInfo connects it. Times are in
    seconds, on any clock that never goes back."""

    def __init__(self, now: float, *, give_up_s: float = inf, observe: bool = False) -> None:
        """`give_up_s`: requests fail with code not_ready when no router has answered for so long.
        `observe`: also subscribe to Observed, the events of all requests of the router."""
        self.info: ClusterInfo | None = None  # None while no router answers
        self.lost_since: float | None = now
        self.losses = 0
        self.attempts = Attempts()
        self._give_up_s = give_up_s
        self._observe = observe
        self._told = GetClusterInfo()  # with the last changes of adapters
        self._requests: dict[str, PendingRequest] = {}  # by the id of the current attempt
        self._forgotten: dict[str, int] = {}  # id -> attempt that may still have news under way
        self._outgoing: list[Message] = []
        self._orphans: list[str] = []  # attempts to abort as soon as a router answers
        self._heard = self._inquired = -inf

    # ---- requests

    def submit(self, submit: Submit, context: Any = None, *, now: float) -> PendingRequest:
        """Track a new request. It is sent at once, or when a router answers. Its times begin now. The
        id of a forgotten one may be used again: as another attempt, it gets no news of the first."""
        attempt = self._forgotten.pop(submit.request, -1) + 1
        request = PendingRequest(submit, context, attempt, now)
        if submit.queue_timeout_s > 0:
            request.placed_by = now + submit.queue_timeout_s
        if submit.timeout_s > 0:
            request.ended_by = now + submit.timeout_s
        self._requests[request.attempt_id] = request
        self.attempts.forget(request.attempt_id)
        if self.lost_since is None:
            self._send(request, now)
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
            self._forgotten[request.id] = request.attempt
            if len(self._forgotten) > FORGOTTEN:
                del self._forgotten[next(iter(self._forgotten))]

    def fail_all(self, code: str, message: str) -> list[Event]:
        """Fail every request."""
        requests = list(self._requests.values())
        for request in requests:
            self.forget(request)
        return [Update(each, Failed(each.id, code, message)) for each in requests]

    @property
    def live(self) -> set[str]:
        """The requests under way, by the ids of their first attempts."""
        return {self.attempts.of(name).request for name in self._requests}

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
        self._outgoing += [self._told, Observe()] if self._observe else [self._told]

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
                if message.changes != NONE:
                    self._told = GetClusterInfo(message.fingerprint, message.changes)
                return [*self._resubmit(now), message]
            case AdapterChanged():
                return [message]
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
        for each in self._requests.values():
            each.queued_again(now)
        aborted = [each for each in self._requests.values() if each.aborted]
        return [RouterLost(reason), *map(self._end_aborted, aborted)]

    def tick(self, now: float) -> list[Event]:
        """Call it several times a second, after all that has arrived was passed to received()."""
        overdue = self._fail_overdue(now)
        if self.lost_since is not None:
            if now >= self._inquired + INQUIRE_S:  # for ever: a router may come back after any time
                self.inquire(now)
            if now >= self.lost_since + self._give_up_s:
                why = f"no router has answered for {self._give_up_s:.0f} s"
                return overdue + self.fail_all("not_ready", why)
        elif self._inquired <= self._heard:
            if now >= self._heard + SILENCE_S:
                self.inquire(now)
        elif now >= self._inquired + ANSWER_S:
            return overdue + self.connection_lost(now, "it has stopped answering")
        return overdue

    def _fail_overdue(self, now: float) -> list[Event]:
        """End what is overdue, where no router does. A router that is there but silent may have placed a
        request, so its queue timeout is left to it."""
        lost = self.lost_since
        if lost is None and now < self._heard + QUIET_S:
            return []
        events: list[Event] = []
        for each in list(self._requests.values()):
            if now >= each.ended_by:
                failed = each.too_late
            elif lost is not None and now >= each.placed_by:
                why = (
                    f"no worker took the request within {each.submit.queue_timeout_s:g} s: no router "
                    f"has answered for {now - lost:.0f} s; send it again later"
                )
                failed = Failed(each.id, "queue_timeout", why)
            else:
                continue
            self.forget(each)
            events.append(Update(each, failed))
        return events

    # ---- inside

    def _send(self, request: PendingRequest, now: float) -> None:
        request.sent = True
        self._outgoing.append(request.for_router(now))

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
            elif isinstance(news, Finished | Failed):
                self._no_more_news(news.request)
            return []
        if (why := _nonsense(news)) is not None:
            self.forget(request)
            return [Update(request, Failed(request.id, "internal_error", why))]
        if isinstance(news, Finished):
            news = replace(news, timings=_possible(news.timings))
        if isinstance(news, Failed) and news.code == "deadline_exceeded":
            news = replace(request.too_late, request=news.request)  # counted from the first attempt
        if isinstance(news, Finished | Failed):
            del self._requests[request.attempt_id]
            request.ended = True
        fresh = request.fresh(news)
        return [] if fresh is None else [Update(request, fresh)]

    def _no_more_news(self, attempt_id: str) -> None:
        """These were the last of a forgotten request: its id need not be remembered."""
        request, _, attempt = attempt_id.rpartition(".")
        if self._forgotten.get(attempt_id) == 0:
            del self._forgotten[attempt_id]
        elif attempt.isdecimal() and self._forgotten.get(request) == int(attempt):
            del self._forgotten[request]

    def _end_aborted(self, request: PendingRequest) -> Update:
        self.forget(request)
        return Update(request, Finished(request.id, "abort", Timings()))

    def _resubmit(self, now: float) -> list[Event]:
        if self.lost_since is None:
            return []
        overdue = self._fail_overdue(now)
        self.lost_since = None
        lost = [each for each in self._requests.values() if each.sent]
        # If only the connection was cut, it is the same router, and the old attempts still run.
        orphans, self._orphans = self._orphans, []
        self._outgoing += map(Abort, (*orphans, *(each.attempt_id for each in lost)))
        ids = [each.attempt_id for each in lost]
        for each in lost:
            each.next_attempt()
        self.attempts.replaced(
            (old, each.attempt_id, now - each.submitted)
            for old, each in zip(ids, lost, strict=True)
        )
        requests = list(self._requests.values())
        self._requests = {each.attempt_id: each for each in requests}
        for each in requests:
            self._send(each, now)
        return [*overdue, Resubmitted(len(lost))] if lost else overdue


def _left(deadline: float, now: float, limit: float) -> float:
    """Seconds to the deadline: never 0, which is no limit, nor more than the caller's limit."""
    return min(max(deadline - now, 0.001), limit)


def _nonsense(news: News) -> str | None:
    """What a router cannot mean, because the caller could not use it; None for sound news."""
    match news:
        case Accepted(_, prompt_tokens, _) if prompt_tokens < 1:
            return f"the router counts {prompt_tokens} tokens in the prompt"
        case Emitted(_, ids, _, logprobs, ages):
            if any(len(each) not in (0, len(ids)) for each in (logprobs, ages)):
                counts = f"{len(logprobs)} logprobs and {len(ages)} ages"
                return f"the router sent {counts} with {len(ids)} tokens"
        case Finished(_, reason, _) if reason not in REASONS:
            return f"the router ended the request with reason {reason[:40]!r}"
    return None


def _possible(timings: Timings) -> Timings:
    """Without times and counts that cannot be: they are for statistics, so 0 stands for them."""
    wrong = [name for name in TIMINGS if not 0 <= getattr(timings, name) < inf]
    return replace(timings, **dict.fromkeys(wrong, 0)) if wrong else timings
