"""Stream: one HTTP request under way, from its submission to the last byte of its response.

    Submit -> router -> news -> Choice.update -> Delta -> Shape.piece (JSON) -> ChunkEncoder (bytes)

Of many choices a window is at the router and without a token at once; the others wait here, in line.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.types import Receive

from baton import failpoint
from baton.client.aio import RouterClient
from baton.client.tracker import News, PendingRequest
from baton.clock import monotonic
from baton.params import GenerationParams
from baton.server.admission import Ticket
from baton.server.api_error import ApiError, body, from_failed
from baton.server.backlog import BACKLOG, Backlog
from baton.server.bodies import in_thread
from baton.server.quotas import Place
from baton.server.shapes import Choice, ChunkEncoder, Delta, Shape, billed, usage
from baton.server.sse import DONE, event, gone
from baton.wire.messages import Accepted, Emitted, Failed, Finished, Submit
from baton.wire.records import Timings

SHARED_TOKENS = 64
"""Of several answers to a prompt of so many tokens the first goes ahead: at its first token the prompt's
KV is in the prefix cache, and the others need no prefill."""
TURN = 32
"""News of a request that are handled before others have their turn."""
CHUNK_BYTES = 65536
LONG_ANSWER = 500  # tokens; longer ones are encoded in a thread
SLACK_S = 0.5
"""The router ends what is past its deadline; if it has not by then, this server does."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds from `began`. 0: no limit."""

    began: float = field(default_factory=monotonic)
    timeout_s: float = 0.0  # for the whole request
    queue_timeout_s: float = 0.0  # for each choice, until a worker takes it

    @property
    def left_s(self) -> float:
        """For a Submit that is sent now."""
        return max(self.timeout_s - (monotonic() - self.began), 0.001) if self.timeout_s else 0.0


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """One HTTP request, checked and tokenized, with its places. Choice i is answer i % n to prompt
    i // n."""

    name: str  # its id, and the beginning of its submits' ids
    prompts: tuple[tuple[int, ...], ...]
    params: tuple[GenerationParams, ...]  # of each prompt
    n: int
    shape: Shape
    ticket: Ticket
    deadlines: Deadlines = field(default_factory=Deadlines)
    echoes: tuple[str, ...] = ()  # the text of each prompt; empty: no echo
    priority: int = 0
    role_policy: str = ""
    place: Place | None = None  # among its tenant's requests
    include_usage: bool = False
    prompt_only: bool = False  # no generated token is returned
    pooling: str = ""  # an embedding is asked for (baton/params.py)

    def submit(self, choice: int) -> Submit:
        """For the router. Made when it is sent: thousands of long prompts would take a second."""
        prompt, answer = divmod(choice, self.n)
        return Submit(
            f"{self.name}-{choice}",
            self.prompts[prompt],
            _of_choice(self.params[prompt], answer),
            tenant=self.ticket.tenant,
            group=self.name,
            priority=self.priority,
            role_policy=self.role_policy,
            queue_timeout_s=self.deadlines.queue_timeout_s,
            timeout_s=self.deadlines.left_s,
            pooling=self.pooling,
        )


def _of_choice(params: GenerationParams, choice: int) -> GenerationParams:
    """Each choice draws its own random numbers."""
    if not choice or params.sampling is None:
        return params
    return replace(params, sampling=replace(params.sampling, choice=choice))


class GenerationStream:
    """The choices of one HTTP request. Its response is read by one of events, chunks and whole."""

    def __init__(self, router: RouterClient, request: PreparedRequest) -> None:
        self._router = router
        self._request = request
        self._queue = Backlog(self._too_slow)
        # Messages that arrived before all submits were accepted.
        self._early: deque[tuple[PendingRequest, News]] = deque()
        self._pending: dict[PendingRequest, Choice] = {}
        self._tokenless: set[PendingRequest] = set()
        first: dict[tuple[int, ...], int] = {}
        for index, prompt in enumerate(request.prompts):
            first.setdefault(prompt, index)
        self._alike = [first[prompt] for prompt in request.prompts]  # equal prompts by the first
        # By that. None: it has spoken, so the prompt's KV is there.
        self._ahead: dict[int, PendingRequest | None] = {}
        self._behind: dict[PendingRequest, list[int]] = {}
        n, echoes = request.n, request.echoes
        self.choices = [
            Choice(i * n + k, prompt, echoes[i] if echoes else "")
            for i, prompt in enumerate(request.prompts)
            for k in range(n)
        ]
        self._line = deque(range(len(self.choices)))
        self._open = len(self.choices)
        self._alarm: asyncio.TimerHandle | None = None
        self.when_closed: Callable[[int], None] | None = None
        """Called once, with the tokens of the longest choice."""

    @property
    def allowed(self) -> list[int]:
        """The most tokens that each choice may have."""
        return [own.max_new_tokens for own in self._request.params for _ in range(self._request.n)]

    def start(self) -> None:
        """Submit the first choices. From here on the stream must be closed."""
        request = self._request
        if request.deadlines.timeout_s:
            patience = request.deadlines.left_s + SLACK_S
            self._alarm = asyncio.get_running_loop().call_later(patience, self._too_late)
        self._move_up()

    def _move_up(self) -> None:
        """Submit from the line, while the window has room."""
        while self._line and len(self._tokenless) < self._request.ticket.window:
            index = self._line.popleft()
            alike = self._alike[index // self._request.n]
            ahead = self._ahead.get(alike)
            if ahead is not None:
                self._behind[ahead].append(index)
                continue
            pending = self._router.submit(self._request.submit(index), self._queue)
            self._pending[pending] = self.choices[index]
            self._tokenless.add(pending)
            shared = len(self.choices[index].prompt_ids) >= SHARED_TOKENS
            if shared and alike not in self._ahead:
                self._ahead[alike], self._behind[pending] = pending, []

    def _has_token(self, pending: PendingRequest) -> None:
        """Or has ended. Those behind it are next."""
        if pending not in self._tokenless:
            return
        self._tokenless.discard(pending)
        self._request.ticket.moved_up()
        if pending in self._behind:
            alike = self._alike[self._pending[pending].index // self._request.n]
            self._ahead[alike] = None
            self._line.extendleft(reversed(self._behind.pop(pending)))
        self._move_up()

    def _too_slow(self) -> None:
        """More waits for the client than may. Nothing more is generated for it."""
        logger.warning("%s: the client reads its answer too slowly", self._request.name)
        self._give_up()

    def _too_late(self) -> None:
        """The router should have said so."""
        limit = self._request.deadlines.timeout_s
        for pending in [each for each in self._pending if not each.ended][:1]:
            text = f"the request has not ended within its timeout of {limit:g} s"
            late = Failed(pending.id, "deadline_exceeded", text)
            self._queue.put_nowait((pending, late))

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
        """New text and tokens of any choice; each choice itself once it has ended. What has waited for a
        slow client is passed on in turns, so that it holds up no other."""
        turn = 0
        while self._open:
            turn = 0 if self._queue.empty() and not self._early else turn + 1
            if turn >= TURN:
                turn = 0
                await asyncio.sleep(0)
            pending, news = self._early.popleft() if self._early else await self._queue.get()
            choice = self._pending[pending]
            if isinstance(news, Emitted | Finished | Failed):
                self._has_token(pending)
            delta = choice.update(news)
            if delta is not None and not self._request.prompt_only:
                yield delta
            if choice.finish_reason is not None or choice.failed is not None:
                self._open -= 1
                if self._request.prompt_only:
                    choice.text, choice.token_ids, choice.logprobs = "", [], []
                yield choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Those available at the same time are yielded as one, up to CHUNK_BYTES.
        Ends with [DONE] after every choice's finish_reason, or after an error."""
        encoder, ready = ChunkEncoder(self._request.shape), b""
        try:
            async for part in self._parts():
                ready += encoder.event(part) if isinstance(part, Delta) else event(part)
                waits = self._open and not self._early and self._queue.empty()
                if ready and (waits or len(ready) >= CHUNK_BYTES):
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
                if isinstance(part, Delta):
                    for piece in self._request.shape.pieces(part):
                        yield piece
                else:
                    yield part

    async def _parts(self) -> AsyncGenerator[dict[str, Any] | Delta, None]:
        """Chunks, and deltas that are still to be encoded."""
        shape, opened = self._request.shape, set[int]()
        self._queue.limit = BACKLOG
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

    async def whole(self, receive: Receive) -> bytes:
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
        encode = partial(self._request.shape.whole, self.choices, self.usage())
        long = sum(len(c.token_ids) + len(c.scores) + len(c.embedding) for c in self.choices)
        return await in_thread(long >= LONG_ANSWER, encode)

    async def _drain(self) -> None:
        async for each in self.deltas():
            if isinstance(each, Choice) and each.failed is not None:
                raise from_failed(each.failed.code, each.failed.message)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens."""
        return usage(self.choices, self._request.prompts)

    def cancel(self) -> None:
        """End all choices that are still running with finish_reason abort."""
        waiting = [*self._line, *(index for each in self._behind.values() for index in each)]
        for index in waiting:  # never sent
            self._pending[PendingRequest(self._request.submit(index))] = self.choices[index]
        self._line.clear()
        self._behind.clear()
        for pending in self._pending:
            if not pending.ended:
                self._router.abort(pending)
                aborted = Finished(pending.id, "abort", Timings())
                self._queue.put_nowait((pending, aborted))

    def close(self) -> None:
        """Abort choices that are still running: their results are not needed. May be called again."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._give_up()
        if self.when_closed is not None:
            self.when_closed(max(len(each.token_ids) for each in self.choices))
            self.when_closed = None
        self._request.ticket.close()
        if self._request.place is not None:
            self._request.place.close(billed(self.choices, self._request.n), monotonic())

    def _give_up(self) -> None:
        self._line.clear()
        self._behind.clear()
        for pending in self._pending:
            self._router.abort(pending)
