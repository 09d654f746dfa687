"""Batch: requests that belong together, from Submit to Completion. No sockets.

    Submit ... Accepted, Emitted, Emitted, Finished -> Completion
                                           Failed   -> Failure

complete() runs a batch through a blocking Client: the offline job. The calls of an LLM run theirs
through its thread (baton/llm.py). Lost routers are the tracker's concern (baton/client/tracker.py).
"""

from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

from baton.client.blocking import POLL_S, Client, Notice
from baton.client.tracker import News
from baton.wire.messages import Accepted, ClusterInfo, Emitted, Failed, Finished, Submit
from baton.wire.records import Logprob, Timings


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt. Times are in seconds, on the client's clock."""

    index: int  # of the prompt in its batch
    text: str  # without the prompt
    token_ids: tuple[int, ...]
    finish_reason: str  # length: max_new_tokens are reached; or stop
    prompt_tokens: int = 0
    logprobs: tuple[Logprob, ...] | None = None  # one for each token, if requested
    tokenize_s: float = 0.0
    timings: Timings = field(default_factory=Timings)
    submitted: float = 0.0
    ended: float = 0.0
    arrivals: tuple[float, ...] = ()  # one per token: its message's arrival minus the token's age
    tool_calls: tuple[tuple[str, str], ...] = ()  # of LLM.chat: names, and arguments as JSON


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


@dataclass(slots=True)
class _Running:
    index: int
    submit: Submit
    submitted: float
    prompt_tokens: int = 0
    tokenize_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    def completion(self, done: Finished, now: float) -> Completion:
        return Completion(
            index=self.index,
            text="".join(self.parts),
            token_ids=tuple(self.token_ids),
            finish_reason=done.reason,
            prompt_tokens=self.prompt_tokens,
            logprobs=tuple(self.logprobs) if self.submit.params.logprobs >= 0 else None,
            tokenize_s=self.tokenize_s,
            timings=done.timings,
            submitted=self.submitted,
            ended=now,
            arrivals=tuple(self.arrivals),
        )


class Batch:
    """Requests, at most `limit` of them with the router at a time; each ends with one Completion or
    Failure. Their keys in `submits` become the `index` of their events."""

    def __init__(self, submits: Mapping[int, Submit], *, limit: int) -> None:
        self._waiting = deque(submits.items())
        self._limit = limit
        self.running: dict[str, _Running] = {}

    @property
    def done(self) -> bool:
        """Every request has ended."""
        return not self.running and not self._waiting

    def next_requests(self, now: float) -> list[Submit]:
        """The requests to submit now."""
        free = min(self._limit - len(self.running), len(self._waiting))
        chosen = [_Running(*self._waiting.popleft(), now) for _ in range(free)]
        self.running.update((each.submit.request, each) for each in chosen)
        return [each.submit for each in chosen]

    def take(self, news: News, now: float) -> Streamed | Completion | Failure | None:
        """Take in the news of a request; those of another user of the router are passed over."""
        if (running := self.running.get(news.request)) is None:
            return None
        match news:
            case Accepted(_, prompt_tokens, tokenize_s):
                running.prompt_tokens, running.tokenize_s = prompt_tokens, tokenize_s
            case Emitted(_, token_ids, text):
                running.token_ids += token_ids
                running.parts.append(text)
                running.logprobs += news.logprobs
                ages = news.ages or (0.0,) * len(token_ids)
                running.arrivals += [now - age for age in ages]
                return Streamed(running.index, len(token_ids), text)
            case Finished() | Failed():
                del self.running[news.request]
                if isinstance(news, Failed):
                    return Failure(running.index, news.code, news.message)
                if news.reason == "abort":
                    return Failure(running.index, "aborted", "the router ended the request")
                return running.completion(news, now)
        return None


Event = Completion | Failure | Streamed | Notice | ClusterInfo


def complete(
    client: Client, submits: Mapping[int, Submit], *, limit: int
) -> Generator[Event, None, None]:
    """Complete every request, at most `limit` at once. Closing the iterator aborts those that run.
    Raises as Client.poll() and Client.check_answering() do."""
    batch = Batch(submits, limit=limit)
    try:
        while not batch.done:
            if requests := batch.next_requests(client.clock()):
                client.submit(*requests)
            received = client.poll(POLL_S)
            now = client.clock()
            for each in received:
                if isinstance(each, ClusterInfo | Notice):
                    yield each
                elif (event := batch.take(each, now)) is not None:
                    yield event
            client.check_answering()
    finally:
        for request in batch.running:
            client.forget(request)
