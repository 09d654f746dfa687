"""Stream: one HTTP request under way, from its submission to the last byte of its response.

    Submit -> router -> news -> Choice.update -> Delta -> Shape.piece (JSON) -> ChunkEncoder (bytes)

Shapes: https://platform.openai.com/docs/api-reference (completions and chat), as vLLM serves them.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.types import Receive

from baton import failpoint
from baton.client.aio import Queue, RouterClient
from baton.client.tracker import News, PendingRequest
from baton.server.api_error import ApiError, body, from_failed
from baton.server.sse import DONE, event, gone, json_of
from baton.text import Tokenizer
from baton.wire.messages import Accepted, Emitted, Failed, Finished, PromptScored, Submit
from baton.wire.records import Logprob, Timings

SHARED_TOKENS = 64
"""Of several answers to a prompt of so many tokens the first goes ahead: at its first token the prompt's
KV is in the prefix cache, and the others need no prefill."""
MARK = "\0"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAST = -9999.0
"""OpenAI's logprob of a token that cannot be drawn. JSON has no minus infinity."""


@dataclass(slots=True)
class Choice:
    """One answer, generated so far."""

    index: int
    prompt_ids: tuple[int, ...]
    echo: str = ""  # the prompt's text, if the answer begins with it
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    scores: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    failed: Failed | None = None
    timings: Timings | None = None

    def update(self, news: News) -> "Delta | None":
        """Apply a message. Returns its text and tokens, if any."""
        match news:
            case PromptScored(_, scores):
                self.scores = scores
            case Emitted(_, token_ids, text, logprobs):
                self.text += text
                self.token_ids += token_ids
                self.logprobs += logprobs
                return Delta(self, text, token_ids, logprobs)
            case Finished(_, reason, timings):
                self.finish_reason, self.timings = reason, timings
            case Failed():
                self.failed = news
        return None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of a choice."""

    choice: Choice
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Logprob]


def usage(choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Counts of tokens. A prompt counts once, however many choices it has."""
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    cached = sum(choice.timings.cached_tokens for choice in choices if choice.timings)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt_tokens)},
    }


# ---- JSON


class Shape(ABC):
    """A kind of response: the JSON of its choices and of the response around them."""

    whole_object = chunk_object = ""

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        logprobs: int = -1,
        prompt_logprobs: int = -1,
    ) -> None:
        """`head`: id, time and model. The rest is as in GenerationParams."""
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self.plain = logprobs < 0  # the chunks of a choice differ in their text only

    @abstractmethod
    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk, if it holds no generated text."""

    @abstractmethod
    def piece(self, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""

    @abstractmethod
    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk with the finish_reason."""

    @abstractmethod
    def _whole(self, choice: Choice) -> dict[str, Any]:
        """A choice of the whole response."""

    def ending(self, usage_: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._response(self.chunk_object, [], usage=usage_)

    def whole(self, choices: Sequence[Choice], usage_: dict[str, Any]) -> dict[str, Any]:
        """The response as one object."""
        return self._response(self.whole_object, [self._whole(c) for c in choices], usage=usage_)

    def _token(self, token_id: int) -> str:
        """The text of one token by itself: half a character is U+FFFD."""
        return self._tokenizer.decode([token_id], special=True)

    def _chunk(self, *entry: Any) -> dict[str, Any]:
        return self._response(self.chunk_object, [_entry(*entry)])

    def _response(self, kind: str, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices} | more


def _entry(
    choice: Choice,
    name: str,
    content: Any,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "index": choice.index,
        name: content,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


class CompletionShape(Shape):
    """/v1/completions."""

    whole_object = chunk_object = "text_completion"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The echoed prompt."""
        if not choice.echo:
            return None
        return self._chunk(choice, "text", choice.echo, self._of_prompt(choice))

    def piece(self, delta: Delta) -> dict[str, Any]:
        start = len(delta.choice.token_ids) - len(delta.token_ids)
        logprobs = self._generated(delta.choice, start, delta)
        return self._chunk(delta.choice, "text", delta.text, logprobs)

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, "text", "", None, choice.finish_reason)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        logprobs = _joined(self._of_prompt(choice), self._generated(choice, 0, choice))
        return _entry(choice, "text", choice.echo + choice.text, logprobs, choice.finish_reason)

    def _of_prompt(self, choice: Choice) -> dict[str, Any] | None:
        if self._prompt_logprobs < 0:
            return None
        scores = [None, *choice.scores]
        return self.listed(choice.prompt_ids, scores, top=self._prompt_logprobs)

    def _generated(self, choice: Choice, start: int, new: Choice | Delta) -> dict[str, Any] | None:
        """Logprobs of `new`, whose first token is the choice's token number `start`."""
        if self._logprobs < 0:
            return None
        before = sum(len(self._token(each)) for each in choice.token_ids[:start])
        return self.listed(
            new.token_ids, new.logprobs, offset=len(choice.echo) + before, top=self._logprobs
        )

    def listed(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob | None],
        *,
        offset: int = 0,
        top: int = 0,
    ) -> dict[str, Any]:
        """Logprobs as lists. The first token of a prompt has none."""
        tokens = [self._token(each) for each in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [
                None if each is None else max(each.value, LEAST) for each in logprobs
            ],
            "top_logprobs": [self._top(each) for each in logprobs] if top else None,
            "text_offset": offsets,
        }

    def _top(self, logprob: Logprob | None) -> dict[str, float] | None:
        if logprob is None:
            return None
        pairs = zip(logprob.top_ids, logprob.top_values, strict=True)
        best: dict[str, float] = {}
        for token_id, value in pairs:  # ids with equal text: the likeliest is kept
            best.setdefault(self._token(token_id), max(value, LEAST))
        return best


class ChatShape(Shape):
    """/v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The role."""
        return self._chunk(choice, "delta", {"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text}
        return self._chunk(delta.choice, "delta", content, self._generated(delta))

    def closing(self, choice: Choice) -> dict[str, Any]:
        return self._chunk(choice, "delta", {}, None, choice.finish_reason)

    def _whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return _entry(choice, "message", message, self._generated(choice), choice.finish_reason)

    def _generated(self, new: Choice | Delta) -> dict[str, Any] | None:
        return self.listed(new.token_ids, new.logprobs) if self._logprobs >= 0 else None

    def listed(self, token_ids: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """Logprobs as one object a token."""
        content = []
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            top = zip(logprob.top_ids, logprob.top_values, strict=True)
            content.append(
                self._scored(token_id, logprob.value)
                | {"top_logprobs": [self._scored(each, value) for each, value in top]}
            )
        return {"content": content, "refusal": None}

    def _scored(self, token_id: int, value: float) -> dict[str, Any]:
        text = self._token(token_id)
        whole = REPLACEMENT not in text
        return {
            "token": text,
            "logprob": max(value, LEAST),
            "bytes": list(text.encode()) if whole else None,
        }


def _joined(*parts: dict[str, Any] | None) -> dict[str, Any] | None:
    """The prompt's logprobs followed by the answer's."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    joined: dict[str, Any] = {}
    for name in given[0]:
        lists = [part[name] for part in given]
        joined[name] = None if None in lists else [each for one in lists for each in one]
    return joined


# ---- the request under way


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """One HTTP request, checked and tokenized."""

    name: str  # its id, and the beginning of its submits' ids
    prompts: tuple[tuple[int, ...], ...]
    submits: tuple[Submit, ...]  # one for each choice; as many for each prompt
    shape: Shape
    echoes: tuple[str, ...] = ()  # the prompt's text for each choice; empty: no echo
    include_usage: bool = False
    prompt_only: bool = False  # no generated token is returned


class GenerationStream:
    """The choices of one HTTP request. Its response is read by one of events, chunks and whole."""

    def __init__(self, router: RouterClient, request: PreparedRequest) -> None:
        self._router = router
        self._request = request
        self._queue: Queue = Queue()
        # Messages that arrived before all submits were accepted.
        self._early: deque[tuple[PendingRequest, News]] = deque()
        self._pending: dict[PendingRequest, Choice] = {}
        self._behind: dict[PendingRequest, list[tuple[Submit, Choice]]] = {}
        echoes = request.echoes or ("",) * len(request.submits)
        self.choices = []
        ahead: dict[tuple[int, ...], PendingRequest] = {}
        repeats = len(request.submits) // len(request.prompts)
        for i, submit in enumerate(request.submits):
            prompt = request.prompts[i // repeats]
            choice = Choice(i, prompt, echoes[i])
            self.choices.append(choice)
            if prompt in ahead:
                self._behind.setdefault(ahead[prompt], []).append((submit, choice))
                continue
            pending = self._submit(submit, choice)
            if len(prompt) >= SHARED_TOKENS:
                ahead[prompt] = pending
        self._open = len(self.choices)

    def _submit(self, submit: Submit, choice: Choice) -> PendingRequest:
        pending = self._router.submit(submit, self._queue)
        self._pending[pending] = choice
        return pending

    async def accepted(self) -> None:
        """Wait until the router has accepted every submit. Raises ApiError if it rejects one."""
        missing = set(self._pending)
        while missing:
            pending, news = await self._queue.get()
            if isinstance(news, Failed):
                raise from_failed(news.code, news.message)
            if isinstance(news, Accepted):
                missing.discard(pending)
            else:
                self._early.append((pending, news))

    async def deltas(self) -> AsyncGenerator[Delta | Choice, None]:
        """New text and tokens of any choice; each choice itself once it has ended."""
        while self._open:
            pending, news = self._early.popleft() if self._early else await self._queue.get()
            choice = self._pending[pending]
            if isinstance(news, Emitted | Finished | Failed):
                for submit, other in self._behind.pop(pending, ()):
                    self._submit(submit, other)
            delta = choice.update(news)
            if delta is not None and not self._request.prompt_only:
                yield delta
            if choice.finish_reason is not None or choice.failed is not None:
                self._open -= 1
                if self._request.prompt_only:
                    choice.text, choice.token_ids, choice.logprobs = "", [], []
                yield choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Those available at the same time are yielded as one. Ends with [DONE] after
        every choice's finish_reason, or after an error."""
        encoder, ready = ChunkEncoder(self._request.shape), b""
        try:
            async for part in self._parts():
                ready += encoder.event(part) if isinstance(part, Delta) else event(part)
                if self._open and not self._early and self._queue.empty():
                    failpoint.hit("server.chunk")
                    yield ready
                    ready = b""
            yield ready + DONE
        finally:
            self.close()

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """JSON chunks."""
        async with contextlib.aclosing(self._parts()) as parts:
            async for part in parts:
                yield self._request.shape.piece(part) if isinstance(part, Delta) else part

    async def _parts(self) -> AsyncGenerator[dict[str, Any] | Delta, None]:
        """Chunks, and deltas that are still to be encoded."""
        shape, opened = self._request.shape, set[int]()
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for each in deltas:
                choice = each if isinstance(each, Choice) else each.choice
                if choice.index not in opened:
                    opened.add(choice.index)
                    if (opening := shape.opening(choice)) is not None:
                        yield opening
                if isinstance(each, Delta):
                    yield each
                elif each.failed is not None:
                    yield body(from_failed(each.failed.code, each.failed.message))
                    return
                else:
                    yield shape.closing(each)
        if self._request.include_usage:
            yield shape.ending(self.usage())

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """The response as one JSON object. Raises ApiError if a choice failed or the client has left."""
        left = asyncio.create_task(gone(receive))
        work = asyncio.create_task(self._drain())
        try:
            await asyncio.wait({left, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError.client_left()
            work.result()
        finally:
            for task in (left, work):
                task.cancel()
            await asyncio.gather(left, work, return_exceptions=True)
            self.close()
        return self._request.shape.whole(self.choices, self.usage())

    async def _drain(self) -> None:
        async for each in self.deltas():
            if isinstance(each, Choice) and each.failed is not None:
                raise from_failed(each.failed.code, each.failed.message)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens."""
        return usage(self.choices, self._request.prompts)

    def cancel(self) -> None:
        """End all choices that are still running with finish_reason abort."""
        for submit, choice in [pair for pairs in self._behind.values() for pair in pairs]:
            self._pending[PendingRequest(submit)] = choice  # never sent
        self._behind.clear()
        for pending in self._pending:
            if not pending.ended:
                self._router.abort(pending)
                aborted = Finished(pending.id, "abort", Timings())
                self._queue.put_nowait((pending, aborted))

    def close(self) -> None:
        """Abort choices that are still running: their results are no longer needed."""
        for pending in self._pending:
            self._router.abort(pending)


class ChunkEncoder:
    """Encodes deltas as events. The chunks of a choice differ in their text only, so the bytes around it
    are encoded once."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._around: dict[int, tuple[str, str]] = {}  # by choice

    def event(self, delta: Delta) -> bytes:
        """The same bytes as event(shape.piece(delta))."""
        if not self._shape.plain:
            return event(self._shape.piece(delta))
        around = self._around.get(delta.choice.index)
        if around is None:
            marked = event(self._shape.piece(replace(delta, text=MARK))).decode()
            before, _, after = marked.rpartition(
                json_of(MARK)
            )  # from the right: the id comes before the text
            around = self._around[delta.choice.index] = before, after
        return f"{around[0]}{json_of(delta.text)}{around[1]}".encode()
