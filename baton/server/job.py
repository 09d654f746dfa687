"""Job: one HTTP request under way: one router request for each of its answers."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.types import Receive

from baton.client.aio import Queue, RouterClient
from baton.client.tracker import News, PendingRequest
from baton.server.choices import Choice, Fresh, Shape, usage
from baton.server.faults import Fault, body, from_failed
from baton.server.frames import Frames
from baton.server.sse import DONE, event, gone
from baton.wire.messages import Accepted, Emitted, Failed, Finished, Submit
from baton.wire.records import Timings

SHARED_TOKENS = 64
"""Of several answers to a prompt of so many tokens the first goes ahead: when it speaks, the prompt's KV
is in the prefix cache, and the others need no prefill."""


class Job:
    """The answers to one HTTP request. `silent`: the prompt alone was asked about."""

    def __init__(
        self,
        line: RouterClient,
        prompts: Sequence[tuple[int, ...]],
        submits: Sequence[Submit],
        *,
        silent: bool = False,
    ) -> None:
        self.prompts = prompts
        self._line = line
        self._silent = silent
        self._queue: Queue = Queue()
        self._early: deque[tuple[PendingRequest, News]] = deque()  # came before all were accepted
        self._choice_of: dict[PendingRequest, Choice] = {}
        self._behind: dict[PendingRequest, list[tuple[Submit, Choice]]] = {}
        ids = [each.prompt if isinstance(each.prompt, tuple) else () for each in submits]
        self.choices = [Choice(i, each) for i, each in enumerate(ids)]
        self._open = len(self.choices)
        first: dict[tuple[int, ...], PendingRequest] = {}
        for submit, choice in zip(submits, self.choices, strict=True):
            ahead = first.get(choice.prompt_ids)
            if ahead is not None:
                self._behind.setdefault(ahead, []).append((submit, choice))
                continue
            request = line.submit(submit, self._queue)
            self._choice_of[request] = choice
            if len(choice.prompt_ids) >= SHARED_TOKENS:
                first[choice.prompt_ids] = request

    async def accepted(self) -> None:
        """Until the router has taken every one of them. Raises Fault if it refuses one."""
        missing = set(self._choice_of)
        while missing:
            request, news = await self._queue.get()
            if isinstance(news, Failed):
                raise from_failed(news.code, news.message)
            if isinstance(news, Accepted):
                missing.discard(request)
            else:
                self._early.append((request, news))

    @property
    def speaks(self) -> bool:
        """Something comes without waiting: news, or the end."""
        return bool(self._early) or not self._open or not self._queue.empty()

    async def news(self) -> AsyncGenerator[Fresh | Choice, None]:
        """Pieces of text, and each choice once more when it has ended."""
        while self._open:
            request, news = self._early.popleft() if self._early else await self._queue.get()
            choice = self._choice_of[request]
            if isinstance(news, Emitted | Finished | Failed):
                for submit, other in self._behind.pop(request, ()):
                    self._choice_of[self._line.submit(submit, self._queue)] = other
            fresh = choice.update(news)
            if fresh is not None and not self._silent:
                yield fresh
            if choice.finish_reason is not None or choice.failed is not None:
                self._open -= 1
                if self._silent:
                    choice.text, choice.token_ids, choice.logprobs = "", [], []
                yield choice

    async def whole(self, receive: Receive) -> None:
        """Until all have ended. Raises Fault if one failed, or the client has left."""
        left = asyncio.create_task(gone(receive))
        work = asyncio.create_task(self._all())
        try:
            await asyncio.wait({left, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Fault.client_left()
            work.result()
        finally:
            for task in (left, work):
                task.cancel()
            await asyncio.gather(left, work, return_exceptions=True)
            self.close()

    async def _all(self) -> None:
        async for each in self.news():
            if isinstance(each, Choice) and each.failed is not None:
                raise from_failed(each.failed.code, each.failed.message)

    def usage(self) -> dict[str, Any]:
        """Tokens asked and said."""
        return usage(self.choices, self.prompts)

    def cancel(self) -> None:
        """The client has had enough: what still runs ends with finish_reason abort."""
        for submit, choice in [pair for pairs in self._behind.values() for pair in pairs]:
            self._choice_of[PendingRequest(submit)] = choice  # it never left
        self._behind.clear()
        for request in self._choice_of:
            if not request.ended:
                self._line.abort(request)
                self._queue.put_nowait((request, Finished(request.id, "abort", Timings())))

    def close(self) -> None:
        """Nobody waits any more: what still runs is taken back."""
        for request in self._choice_of:
            self._line.abort(request)


async def streamed(job: Job, shape: Shape, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The job as server-sent events; what is there at the same time goes together. Ends with [DONE],
    after every choice's finish_reason or an error; never without."""
    frames, said = Frames(shape), b""
    try:
        async for part in _parts(job, shape, include_usage=include_usage):
            said += frames.event(part) if isinstance(part, Fresh) else event(part)
            if not job.speaks:
                yield said
                said = b""
        yield said + DONE
    finally:
        job.close()


async def chunks(
    job: Job, shape: Shape, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The job as JSON chunks."""
    async with contextlib.aclosing(_parts(job, shape, include_usage=include_usage)) as parts:
        async for part in parts:
            yield shape.piece(part) if isinstance(part, Fresh) else part


async def _parts(
    job: Job, shape: Shape, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any] | Fresh, None]:
    """Chunks, and pieces that have yet to become some."""
    opened: set[int] = set()
    async with contextlib.aclosing(job.news()) as news:
        async for each in news:
            choice = each if isinstance(each, Choice) else each.choice
            if choice.index not in opened:
                opened.add(choice.index)
                if (opening := shape.opening(choice)) is not None:
                    yield opening
            if isinstance(each, Fresh):
                yield each
            elif each.failed is not None:
                yield body(from_failed(each.failed.code, each.failed.message))
                return
            else:
                yield shape.closing(each)
    if include_usage:
        yield shape.ending(job.usage())
