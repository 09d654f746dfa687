"""Follower: many prompts through one router, each followed to its end. No socket, no process.

    tasks -> Submit ... Accepted, Emitted, Emitted, Finished -> Completion
                                                     Failed  -> Failure

The router loses no request while it lives. When it is restarted, what was in flight is gone with
it and is submitted again under new ids, from the beginning; reports on the old ids are void.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.clock import Clock
from baton.errors import ProtocolError
from baton.params import GenerationParams
from baton.wire.messages import (
    Accepted,
    ClusterInfo,
    Emitted,
    Failed,
    Finished,
    Submit,
)
from baton.wire.records import Timings

POLL_S = 0.1
SILENCE_S = 10.0  # after so much silence the router is asked whether it is still there
ANSWER_S = 5.0  # and has so long to answer
READY_S = 900.0  # loading the largest models from a slow disk; a dead worker is noticed at once

FromRouter = Accepted | Emitted | Finished | Failed | ClusterInfo


class Line(Protocol):
    """The way to one router: what following needs of baton.client.blocking.Client."""

    def submit(self, *requests: Submit) -> None: ...
    def abort(self, request: str) -> None: ...
    def poll(self, timeout_s: float) -> Sequence[FromRouter]: ...
    def info(self, *, timeout_s: float) -> ClusterInfo: ...


class Supervisor(Protocol):
    """What keeps the processes alive: the part of supervisor.Cluster needed here. `mends`: a router
    that is gone will be there again."""

    mends: bool

    @property
    def router_restarts(self) -> int: ...
    def check(self, info: ClusterInfo | None = None) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to be completed. `index` is its place in the caller's list."""

    index: int
    prompt: str | tuple[int, ...]  # text, or token ids
    max_new_tokens: int | None = None  # None: as many as in the params of all


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its continuation, and when what happened on the follower's clock."""

    task: Task
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # length or stop
    prompt_tokens: int
    tokenize_s: float
    timings: Timings
    submitted: float
    ended: float
    arrivals: tuple[float, ...]  # one for each token, the time it had waited taken off


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt that was not completed. `code` is machine-readable (worker_lost, ...)."""

    task: Task
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Streamed:
    """New text of one prompt, on its way to becoming a Completion."""

    task: Task
    tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person should read."""

    text: str


Happening = Completion | Failure | Streamed | Note | ClusterInfo


@dataclass(slots=True)
class _Flight:
    task: Task
    attempt: int
    submitted: float
    prompt_tokens: int = 0
    tokenize_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)


class Follower:
    """Keeps up to `limit` requests with the router and says what becomes of them.

    `job` opens the request ids and must be unlike that of any other job of this router.
    """

    def __init__(
        self, line: Line, supervisor: Supervisor, *, job: str, limit: int, clock: Clock
    ) -> None:
        self._line = line
        self._supervisor = supervisor
        self._job = job
        self._limit = limit
        self._clock = clock
        self._flights: dict[str, _Flight] = {}
        self._restarts = supervisor.router_restarts
        self._known = False  # the router of this life has answered, and tells us its news
        self._news: ClusterInfo | None = None  # not yet passed on to the supervisor
        self._heard = clock()

    def await_ready(self, *, ours: bool) -> Iterator[Happening]:
        """Until the router says that it can work. A router we started (`ours`) may take its time
        to answer; any other must be there already: ProtocolError."""
        deadline = self._clock() + READY_S
        info: ClusterInfo | None = None
        while info is None or not info.ready:
            yield from self._supervise()
            before = info
            if not self._known:
                info = self._first_answer(ours=ours) or info
            else:
                messages = self._line.poll(POLL_S)
                self._mind_silence(bool(messages), self._clock())
                for news in messages:
                    info = news if isinstance(news, ClusterInfo) else info
            if info is not None and info is not before:
                self._news = info
                yield info
            if self._clock() >= deadline:
                waiting_for = info.waiting_for if info else "the router's answer"
                raise ProtocolError(
                    f"the cluster was not ready after {READY_S:.0f} s; it waits for {waiting_for}"
                )

    def watch(self) -> Iterator[Happening]:
        """For ever: what happens to a cluster of ours; an empty Note where nothing does."""
        while True:
            yield from self._supervise()
            answer = None if self._known else self._first_answer(ours=True)
            news = self._line.poll(POLL_S) if self._known and answer is None else [answer]
            for self._news in (each for each in news if isinstance(each, ClusterInfo)):
                yield self._news
            yield Note("")

    def run(self, tasks: Sequence[Task], params: GenerationParams) -> Iterator[Happening]:
        """Complete every task: each ends with one Completion or one Failure."""
        waiting = deque(tasks)
        lost: list[_Flight] = []
        self._heard = self._clock()
        while waiting or self._flights or lost:
            yield from self._supervise()
            if not self._known:  # a new router: what the old one had is gone
                lost += self._flights.values()
                gone = list(self._flights)
                self._flights.clear()
                if self._first_answer(ours=self._supervisor.mends) is None:
                    continue
                for request in gone:  # the same router, if only the connection was cut
                    self._line.abort(request)
            again = [self._begin(flight.task, flight.attempt + 1, params) for flight in lost]
            if lost:
                self._line.submit(*again)
                yield Note(f"the router was lost and found again: {len(lost)} requests begin again")
                lost = []
            room = min(self._limit - len(self._flights), len(waiting))
            if submits := [self._begin(waiting.popleft(), 0, params) for _ in range(room)]:
                self._line.submit(*submits)  # together, and so they are filled
            messages = self._line.poll(POLL_S)
            now = self._clock()
            for message in messages:
                yield from self._take(message, now)
            self._mind_silence(bool(messages), now)

    def abort_all(self) -> None:
        """Nobody waits for the rest any more: the router may forget it."""
        for request in self._flights:
            self._line.abort(request)
        self._flights.clear()

    def _first_answer(self, *, ours: bool) -> ClusterInfo | None:
        try:
            info = self._line.info(timeout_s=POLL_S if ours else ANSWER_S)
        except ProtocolError:
            if not ours:
                raise
            return None
        self._known = True
        return info

    def _begin(self, task: Task, attempt: int, params: GenerationParams) -> Submit:
        request = f"{self._job}-{task.index}.{attempt}"
        self._flights[request] = _Flight(task, attempt, self._clock())
        if task.max_new_tokens is not None:
            params = replace(params, max_new_tokens=task.max_new_tokens)
        return Submit(request, task.prompt, params)

    def _supervise(self) -> Iterator[Happening]:
        news, self._news = self._news, None
        for text in self._supervisor.check(news):
            yield Note(text)
        if self._supervisor.router_restarts != self._restarts:
            self._restarts = self._supervisor.router_restarts
            self._known = False

    def _take(self, message: FromRouter, now: float) -> Iterator[Happening]:
        if isinstance(message, ClusterInfo):
            self._news = message
            yield message
            return
        flight = self._flights.get(message.request)
        if flight is None:  # of an attempt that is over; a new router may know its Submit
            if isinstance(message, Accepted):
                self._line.abort(message.request)
            return
        match message:
            case Accepted():
                flight.prompt_tokens = message.prompt_tokens
                flight.tokenize_s = message.tokenize_s
            case Emitted():
                flight.token_ids += message.token_ids
                flight.parts.append(message.text)
                ages = message.ages or (0.0,) * len(message.token_ids)
                flight.arrivals += [now - age for age in ages]
                yield Streamed(flight.task, len(message.token_ids), message.text)
            case Finished():
                del self._flights[message.request]
                yield _ended(flight, message, now)
            case Failed():
                del self._flights[message.request]
                yield Failure(flight.task, message.code, message.message)

    def _mind_silence(self, heard: bool, now: float) -> None:
        """A router that is gone says nothing: ask. Raises ProtocolError if there is no answer."""
        if heard:
            self._heard = now
        elif now - self._heard >= SILENCE_S and not self._supervisor.mends:
            self._line.info(timeout_s=ANSWER_S)
            self._heard = self._clock()


def _ended(flight: _Flight, message: Finished, now: float) -> Happening:
    if message.reason == "abort":
        return Failure(flight.task, "aborted", "the router ended the request")
    return Completion(
        task=flight.task,
        text="".join(flight.parts),
        token_ids=tuple(flight.token_ids),
        finish_reason=message.reason,
        prompt_tokens=flight.prompt_tokens,
        tokenize_s=flight.tokenize_s,
        timings=message.timings,
        submitted=flight.submitted,
        ended=now,
        arrivals=tuple(flight.arrivals),
    )
