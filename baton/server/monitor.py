"""Monitor: the router's events of every request, for the page, the metrics and the trace."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import asdict, fields, replace
from operator import attrgetter
from typing import Any, TypeVar

from baton.client.aio import RouterClient
from baton.server.metrics import GOOD, Metrics
from baton.server.otel import Spans
from baton.server.sse import event, json_of
from baton.server.traces import Traces
from baton.timeline import Moment, Timeline
from baton.verdict import RECENT_S, Facts, verdict
from baton.wire.messages import ClusterInfo, Observed
from baton.wire.records import ITL_BUCKETS_S, Counts, Ended, FirstToken

SPAN_S = 10.0
BACKLOG_S = 120.0
MOST_BACKLOG = 20_000
"""Moments that a new page gets, some 5 MB: under load they are of less time than BACKLOG_S."""
AT_ONCE = 200
"""Moments in one event for a new page, some 50 KB: a page that does not read has no more waiting."""
REMEMBERED = 10_000
"""Requests; the load and the verdict rest on no more."""
BEHIND = 256
"""Events a page may be behind before it is disconnected."""
NAMES = tuple(each.name for each in fields(Moment))
VALUES = attrgetter(*NAMES)

Told = TypeVar("Told", FirstToken, Ended)


class Monitor:
    """One for the server. `observed` takes the router's events, `feed` serves a page."""

    def __init__(self, router: RouterClient, metrics: Metrics, spans: Spans | None = None) -> None:
        self._router = router
        self._spans = spans
        self.metrics = metrics
        self._pages: set[asyncio.Queue[bytes]] = set()
        self._info: ClusterInfo | None = None
        self._backlog: deque[tuple[float, str]] = deque(maxlen=MOST_BACKLOG)  # as JSON
        self._shown: tuple[str, ...] | None = None
        self._ended: deque[tuple[float, Facts]] = deque(maxlen=REMEMBERED)
        self._ttft: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._counted: deque[tuple[float, Counts]] = deque()
        self.timeline = Timeline()
        self.traces = Traces(self.timeline, lambda: self._info.model if self._info else "")
        self._alone: OrderedDict[str, None] = OrderedDict()  # requests that ended without a router

    def observed(self, message: Observed) -> None:
        """Events of requests; once a second also the counts."""
        now = message.now
        self.timeline.add(message.moments)
        moments = [json_of(dict(zip(NAMES, VALUES(each), strict=True))) for each in message.moments]
        self._backlog.extend((now, moment) for moment in moments)
        self._shown = None
        if moments and self._pages:
            self._send(_moments(now, moments))
        while self._backlog and self._backlog[0][0] < now - BACKLOG_S:
            self._backlog.popleft()
        if message.counts is not None:
            self.metrics.at_router(message.counts.router, self._router.live)
        for first in map(self._whole, message.first):
            if self.metrics.started(first):
                self._ttft.append((now, first.timings.ttft_s))
        for each in message.ended:
            life = self.timeline.get(each.request)
            if self._spans is not None and life is not None:
                self._spans.ended(each, life, now)
            if self._whole(each).request in self._alone:
                continue  # counted before: the router was only silent
            if self._router.attempts.of(each.request).current:
                self.metrics.ended(self._whole(each))
                self._ended.append((now, facts(each, life.stalled_s if life else 0.0)))
            else:
                self.metrics.replaced(self._whole(each))
        while self._ended and self._ended[0][0] < now - RECENT_S:
            self._ended.popleft()
        while self._ttft and self._ttft[0][0] < now - RECENT_S:
            self._ttft.popleft()
        if message.counts is not None:
            self._count(now, message.counts)

    def ended_alone(self, request: str, reason: str) -> None:
        """A request of this server has ended while no router answered."""
        self.metrics.ended_alone(request, reason)
        self._alone[request] = None
        if len(self._alone) > REMEMBERED:
            self._alone.popitem(last=False)

    def _whole(self, event: Told) -> Told:
        """Told of this server's request, not of the attempt that began when a router was lost: under the
        first attempt's id, and the time before was spent waiting."""
        attempt, times = self._router.attempts.of(event.request), event.timings
        before_s = attempt.after_s
        times = replace(
            times,
            queue_s=times.queue_s + before_s,
            ttft_s=times.ttft_s + before_s,
            total_s=times.total_s + before_s,
        )
        return replace(event, request=attempt.request, timings=times)

    def begin(self, name: str, traceparent: str | None, choices: int = 1) -> None:
        """A client's request is sent to the router, with so many choices. Another of this name, which
        ended alone, is not this one."""
        for each in (name, *(f"{name}-{choice}" for choice in range(choices))):
            self._alone.pop(each, None)
        if self._spans is not None:
            self._spans.begin(name, traceparent)

    def refresh(self) -> None:
        """Called periodically: has the cluster changed?"""
        if self._router.info != self._info:
            self._info = self.metrics.info = self._router.info
            self.metrics.router_restarts = self._router.restarts
            if self._info is None:  # the next router has another clock
                self._counted.clear()
                self._ended.clear()
                self._ttft.clear()
                self._backlog.clear()
                self._shown = None
            self._send(event(_cluster(self._info), "cluster"))

    async def feed(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one page."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(BEHIND)
        self._pages.add(queue)
        backlog = self._shared_backlog() if self._counted else ()
        try:
            yield event(_cluster(self._info), "cluster")
            if self._counted:
                now = self._counted[-1][0]
                for start in range(0, max(len(backlog), 1), AT_ONCE):
                    yield _moments(now, backlog[start : start + AT_ONCE])
                yield event(self.numbers(), "numbers")
            while queue in self._pages:
                yield await queue.get()
        finally:
            self._pages.discard(queue)

    def _shared_backlog(self) -> tuple[str, ...]:
        """The moments that a new page gets; one object for all that open before the next ones come."""
        if self._shown is None:
            self._shown = tuple(moment for _, moment in self._backlog)
        return self._shown

    def numbers(self) -> dict[str, Any]:
        """Load and latencies of the last seconds."""
        before, counts = self._counted[0][1], self._counted[-1][1]
        seconds = self._counted[-1][0] - self._counted[0][0]
        gaps = [b - a for a, b in zip(before.itl, counts.itl, strict=True)]
        ttft = sorted(ttft_s for _, ttft_s in self._ttft)
        generated = counts.generated_tokens - before.generated_tokens
        recent = [each for _, each in self._ended]
        return {
            "now": self._counted[-1][0],
            "running": counts.running,
            "waiting": counts.waiting,
            "tokens_per_s": generated / seconds if seconds else None,
            "ttft_ms": _two(lambda q: ttft[min(int(q * len(ttft)), len(ttft) - 1)], bool(ttft)),
            "itl_most_ms": _two(lambda q: quantile(gaps, q), any(gaps)),
            "kv_used": sum(pool.blocks - pool.free for pool in counts.pools),
            "kv_total": sum(pool.blocks for pool in counts.pools),
            "verdict": verdict(recent, counts.running, counts.waiting),
            "rests_on": {  # how many, in how many seconds
                "ended": len(recent),
                "first_tokens": len(ttft),
                "recent_s": RECENT_S,
                "gaps": sum(gaps),
                "span_s": seconds,
            },
        }

    def _count(self, now: float, counts: Counts) -> None:
        counts = self.metrics.counted(counts)
        self._counted.append((now, counts))
        while self._counted[0][0] < now - SPAN_S:
            self._counted.popleft()
        if self._pages:
            self._send(event(self.numbers(), "numbers"))

    def _send(self, data: bytes) -> None:
        for queue in list(self._pages):
            if queue.full():
                self._pages.discard(queue)  # its feed ends; the page connects again
            else:
                queue.put_nowait(data)


def facts(ended: Ended, stalled_s: float) -> Facts:
    """What the verdict is computed from. A client that left is not a failure."""
    times = ended.timings
    return Facts(
        good=ended.reason in (*GOOD, "abort"),
        prompt_tokens=ended.prompt_tokens,
        tokens=ended.tokens,
        queue_s=times.queue_s + times.reserve_s,
        prefill_s=times.prefill_s,
        handover_s=times.handover_s,
        decode_s=times.decode_s,
        ttft_s=times.ttft_s,
        retries=times.retries,
        preemptions=times.preemptions,
        stalled_s=stalled_s,
    )


def quantile(counts: list[int], q: float) -> float:
    """Upper end of the bucket of ITL_BUCKETS_S that holds the quantile, in seconds."""
    left = q * sum(counts)
    for count, end in zip(counts, (*ITL_BUCKETS_S, ITL_BUCKETS_S[-1]), strict=True):
        left -= count
        if left <= 0:
            return end
    return ITL_BUCKETS_S[-1]


def _two(at: Any, known: bool) -> dict[str, float] | None:
    return {"p50": 1000 * at(0.5), "p99": 1000 * at(0.99)} if known else None


def _moments(now: float, moments: Iterable[str]) -> bytes:
    """An event with all of these."""
    return f'event: moments\ndata: {{"now":{now},"moments":[{",".join(moments)}]}}\n\n'.encode()


def _cluster(info: ClusterInfo | None) -> dict[str, Any]:
    if info is None:
        return {"ready": False, "waiting_for": "the router", "workers": []}
    return {
        "ready": info.ready,
        "waiting_for": info.waiting_for,
        "degraded": info.degraded,
        "model": info.model,
        "context": info.context,
        "workers": [asdict(worker) for worker in info.workers],
    }
