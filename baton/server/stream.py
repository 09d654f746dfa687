"""Stream: one HTTP request under way, from its submission to the last byte of its response."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive

from baton.client.aio import Queue, RouterClient
from baton.client.tracker import News, PendingRequest
from baton.server.api_error import ApiError, body, from_failed
from baton.server.choices import Choice, Delta, Shape, usage
from baton.server.sse import DONE, event, gone, json_of
from baton.wire.messages import Accepted, Emitted, Failed, Finished, Submit
from baton.wire.records import Timings

SHARED_TOKENS = 64
"""Of several answers to a prompt of so many tokens the first goes ahead: at its first token the prompt's
KV is in the prefix cache, and the others need no prefill."""
MARK = "\0"


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """One HTTP request, checked and tokenized."""

    name: str  # its id, and the beginning of its submits' ids
    prompts: tuple[tuple[int, ...], ...]
    submits: tuple[Submit, ...]  # one for each choice; as many for each prompt
    shape: Shape
    echoes: tuple[str, ...] = ()  # what each choice's text begins with; empty: nothing
    include_usage: bool = False
    prompt_only: bool = False  # no generated token is returned


class GenerationStream:
    """The choices of one HTTP request. Its response is read by one of events, chunks and whole."""

    def __init__(self, router: RouterClient, request: PreparedRequest) -> None:
        self._router = router
        self._request = request
        self._queue: Queue = Queue()
        self._early: deque[tuple[PendingRequest, News]] = deque()  # came before all were accepted
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
        """Server-sent events; those that are available at the same time are one piece. Ends with [DONE]
        after every choice's finish_reason or an error."""
        encoder, ready = ChunkEncoder(self._request.shape), b""
        try:
            async for part in self._parts():
                ready += encoder.event(part) if isinstance(part, Delta) else event(part)
                if self._open and not self._early and self._queue.empty():
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
        """Withdraw what is still running: its result is no longer needed."""
        for pending in self._pending:
            self._router.abort(pending)


class ChunkEncoder:
    """Encodes deltas as events. The chunks of a choice differ in little but the text, so what surrounds
    the text is encoded once, by the function that makes a chunk (choices.py)."""

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
            before, _, after = marked.rpartition(json_of(MARK))  # the id stands before the text
            around = self._around[delta.choice.index] = before, after
        return f"{around[0]}{json_of(delta.text)}{around[1]}".encode()
