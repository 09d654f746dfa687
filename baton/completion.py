"""Completion: what an LLM's call returns. Job: the requests of one call until it does."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.client.tracker import News
from baton.errors import BatonError, RequestError, WorkerLost
from baton.grammar import FAILED, INVALID
from baton.wire.messages import Accepted, Emitted, Failed, Finished, Submit
from baton.wire.records import Logprob, Timings

REFUSALS = frozenset(("invalid_request", "context_length_exceeded", INVALID, FAILED))


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt."""

    text: str  # without the prompt
    token_ids: tuple[int, ...]
    finish_reason: str  # length: max_new_tokens are reached; or stop
    prompt_tokens: int
    logprobs: tuple[Logprob, ...] | None  # one for each token, if they were asked for
    timings: Timings


@dataclass(slots=True)
class _Answer:
    index: int
    logprobs_asked: bool
    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)


class Job:
    """The requests of one call, at most `window` of them with the router at a time."""

    def __init__(self, submits: Sequence[Submit], *, single: bool, window: int) -> None:
        self.running: dict[str, _Answer] = {}
        self._waiting = deque(enumerate(submits))
        self._single = single
        self._window = window
        self._completions: list[Completion | None] = [None] * len(submits)

    @property
    def done(self) -> bool:
        return not self.running and not self._waiting

    def next_requests(self) -> list[Submit]:
        """To be submitted now."""
        room = min(self._window - len(self.running), len(self._waiting))
        chosen = [self._waiting.popleft() for _ in range(room)]
        for index, submit in chosen:
            answer = _Answer(index, submit.params.logprobs >= 0)
            self.running[submit.request] = answer
        return [submit for _, submit in chosen]

    def take(self, news: News | Exception) -> Sequence[Emitted]:
        """Keep the news; what is new of texts. Raises what ends the call."""
        if isinstance(news, Exception):
            raise news
        answer = self.running[news.request]
        match news:
            case Emitted():
                answer.token_ids += news.token_ids
                answer.parts.append(news.text)
                answer.logprobs += news.logprobs
                return (news,)
            case Failed() | Finished(reason="abort"):
                del self.running[news.request]
                raise self._error(answer.index, news)
            case Finished():
                del self.running[news.request]
                self._completions[answer.index] = Completion(
                    text="".join(answer.parts),
                    token_ids=tuple(answer.token_ids),
                    finish_reason=news.reason,
                    prompt_tokens=answer.prompt_tokens,
                    logprobs=tuple(answer.logprobs) if answer.logprobs_asked else None,
                    timings=news.timings,
                )
            case Accepted():
                answer.prompt_tokens = news.prompt_tokens
        return ()

    def completions(self) -> Completion | list[Completion]:
        """When it is done: one for a single prompt, else one for each."""
        found = [each for each in self._completions if each is not None]
        assert len(found) == len(self._completions)
        return found[0] if self._single else found

    def _error(self, index: int, news: Failed | Finished) -> BatonError:
        where = "the prompt" if self._single else f"prompts[{index}]"
        if isinstance(news, Finished):
            return BatonError(f"{where}: the router ended the request")
        if news.code in REFUSALS:
            return RequestError(f"{where}: {news.message}", code=news.code)
        kind = WorkerLost if news.code == "worker_lost" else BatonError
        return kind(f"{where}: the request failed ({news.code}): {news.message}")
