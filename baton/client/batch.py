"""BatchClient: completes a list of prompts through one router.

    tasks -> Submit ... Accepted, Emitted, Emitted, Finished -> Completion
                                                     Failed  -> Failure

It keeps a limited number of requests with the router and has the processes of the cluster restarted
meanwhile. Lost routers are the tracker's concern (baton/client/tracker.py).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.client.blocking import Client, Received
from baton.client.tracker import Resubmitted
from baton.clock import Clock
from baton.errors import ProtocolError
from baton.params import GenerationParams
from baton.wire.messages import (
    Accepted,
    ClusterInfo,
    Emitted,
    Failed,
    Finished,
    PromptScored,
    Submit,
)
from baton.wire.records import Timings

POLL_S = 0.1
ANSWER_S = 5.0  # a router that nothing restarts must answer within this time
READY_S = 900.0  # loading the largest models from a slow disk; a dead worker is noticed at once


class Supervisor(Protocol):
    """What BatchClient needs of baton.cluster.supervisor.Cluster. `restarts_router`: a router that
    died is started again."""

    restarts_router: bool

    def check(self, info: ClusterInfo | None = None) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to complete. `index` is its place in the caller's list."""

    index: int
    prompt: str | tuple[int, ...]  # text, or token ids
    max_new_tokens: int | None = None  # None: that of the params


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of prompt `index`, with its measurements. Times are on the client's clock."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # length or stop
    prompt_tokens: int = 0
    tokenize_s: float = 0.0
    timings: Timings = field(default_factory=Timings)
    submitted: float = 0.0
    ended: float = 0.0
    arrivals: tuple[float, ...] = ()  # one per token: its message's arrival minus the token's age


@dataclass(frozen=True, slots=True)
class Failure:
    """Prompt `index` could not be completed. `code` is machine-readable (worker_lost, ...)."""

    index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Streamed:
    """New tokens and text of prompt `index`."""

    index: int
    tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A line for the user."""

    text: str


Event = Completion | Failure | Streamed | Notice | ClusterInfo


@dataclass(slots=True)
class _Running:
    task: Task
    submitted: float
    prompt_tokens: int = 0
    tokenize_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)


class BatchClient:
    """Completes tasks, at most `limit` at once.

    `job` is the prefix of the request ids; two jobs of one router need different ones.
    """

    def __init__(
        self,
        client: Client,
        supervisor: Supervisor,
        *,
        job: str,
        limit: int,
        clock: Clock,
    ) -> None:
        self._client = client
        self._supervisor = supervisor
        self._job = job
        self._limit = limit
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._unchecked: ClusterInfo | None = None  # not yet passed on to the supervisor

    def await_ready(self) -> Iterator[Event]:
        """Until the cluster can work. Raises ProtocolError if it is not ready after READY_S; if nothing
        restarts the router, as soon as it has not answered for ANSWER_S."""
        deadline = self._clock() + READY_S
        info: ClusterInfo | None = None
        self._client.inquire()
        while info is None or not info.ready:
            for event in self._turn():
                info = event if isinstance(event, ClusterInfo) else info
                yield event
            if self._clock() >= deadline:
                waiting_for = info.waiting_for if info else "the router's answer"
                raise ProtocolError(
                    f"the cluster was not ready after {READY_S:.0f} s; it waits for {waiting_for}"
                )

    def watch(self) -> Iterator[Event]:
        """The cluster's events, without end; an empty Notice when there are no more for now."""
        while True:
            yield from self._turn()
            yield Notice("")

    def run(self, tasks: Sequence[Task], params: GenerationParams) -> Iterator[Event]:
        """Complete every task: each ends with exactly one Completion or Failure."""
        waiting = deque(tasks)
        while waiting or self._running:
            free = min(self._limit - len(self._running), len(waiting))
            if submits := [self._begin(waiting.popleft(), params) for _ in range(free)]:
                self._client.submit(*submits)
            yield from self._turn()

    def abort_all(self) -> None:
        """End all requests; there are no more events of them."""
        for request in self._running:
            self._client.forget(request)
        self._running.clear()

    def _begin(self, task: Task, params: GenerationParams) -> Submit:
        request = f"{self._job}-{task.index}"
        self._running[request] = _Running(task, self._clock())
        if task.max_new_tokens is not None:
            params = replace(params, max_new_tokens=task.max_new_tokens)
        return Submit(request, task.prompt, params)

    def _turn(self) -> Iterator[Event]:
        """Check the processes, then take in what has arrived."""
        info, self._unchecked = self._unchecked, None
        for text in self._supervisor.check(info):
            yield Notice(text)
        received = self._client.poll(POLL_S)
        now = self._clock()
        for each in received:
            yield from self._take(each, now)
        lost_since = self._client.lost_since
        if self._supervisor.restarts_router or lost_since is None:
            return
        if now >= lost_since + ANSWER_S:
            raise self._client.no_answer(ANSWER_S)

    def _take(self, received: Received, now: float) -> Iterator[Event]:
        match received:
            case ClusterInfo():
                self._unchecked = received
                yield received
            case Resubmitted(requests):
                yield Notice(
                    f"the router was lost and found again: {requests} requests begin again"
                )
            case Accepted(request, prompt_tokens, tokenize_s) if request in self._running:
                running = self._running[request]
                running.prompt_tokens, running.tokenize_s = prompt_tokens, tokenize_s
            case Emitted(request, token_ids, text) if request in self._running:
                running = self._running[request]
                running.token_ids += token_ids
                running.parts.append(text)
                ages = received.ages or (0.0,) * len(token_ids)
                running.arrivals += [now - age for age in ages]
                yield Streamed(running.task.index, len(token_ids), text)
            case Finished(request) if request in self._running:
                yield _ended(self._running.pop(request), received, now)
            case Failed(request, code, message) if request in self._running:
                yield Failure(self._running.pop(request).task.index, code, message)
            case Accepted() | PromptScored() | Emitted() | Finished() | Failed():
                pass  # of another user of this client


def _ended(running: _Running, message: Finished, now: float) -> Event:
    if message.reason == "abort":
        return Failure(running.task.index, "aborted", "the router ended the request")
    return Completion(
        index=running.task.index,
        text="".join(running.parts),
        token_ids=tuple(running.token_ids),
        finish_reason=message.reason,
        prompt_tokens=running.prompt_tokens,
        tokenize_s=running.tokenize_s,
        timings=message.timings,
        submitted=running.submitted,
        ended=now,
        arrivals=tuple(running.arrivals),
    )
