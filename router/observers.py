"""Observers follow every request live, for the dashboard, traces and metrics; Watchers the cluster.

Observers get events every tenth of a second, if there are any, and counts once a second. Without them
only the counts are kept. No message to them holds a prompt or a text.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from baton.lifecycle import LIVE, PLACED, Event, State
from baton.timeline import STALL_S, Moment
from baton.wire.messages import ClusterInfo, Observed, PoolStats
from baton.wire.node import Effect, To
from baton.wire.records import (
    ITL_BUCKETS_S,
    Counts,
    Decided,
    Ended,
    FirstToken,
    PoolInfo,
    Work,
    WorkerWork,
)
from router.backlog import Backlog
from router.ledger import Entry, Ledger
from router.timings import timings
from router.workers import DECODE, ENGINE, PREFILL, Member, WorkerRegistry

EVENTS_S = 0.1
COUNT_S = 1.0
UPDATE_S = 0.1  # while workers join, news come by the thousand
LOOK_S = 1.0  # texts for people change at most once a second
ON_WORKER = {
    State.RESERVING: DECODE,
    State.RESERVED: DECODE,
    State.FILLING: PREFILL,
    State.DECODING: DECODE,
}


class Observers:
    """The ledger's Listener, and what it sends to the clients that observe."""

    def __init__(self, router: str = "") -> None:
        """`router`: its epoch."""
        self._router = router
        self._clients: dict[str, None] = {}
        self._moments: list[Moment] = []
        self._first: list[FirstToken] = []
        self._ended: list[Ended] = []
        self._tokenless: set[str] = set()  # requests on a worker
        self._works: dict[str, WorkerWork] = {}
        self._with_tokens: dict[str, Entry] = {}
        self._last_token: dict[str, float] = {}
        self._itl = [0] * (len(ITL_BUCKETS_S) + 1)
        self._itl_s = 0.0
        self._generated = self._preempted = self._refilled = 0
        self._lost = {PREFILL: 0, DECODE: 0, ENGINE: 0}
        self._decided: Counter[tuple[str, str]] = Counter()  # who filled a prompt, and why
        self._next_events = self._next_count = 0.0
        self._backlog = Backlog()

    def add(self, client: str) -> None:
        self._clients[client] = None
        self._next_count = 0.0

    def remove(self, client: str) -> None:
        self._clients.pop(client, None)

    # ---- from the ledger

    def happened(self, entry: Entry, event: Event | None, now: float, note: str) -> None:
        self._backlog.moved(entry, now)
        name, gap_s = entry.id, 0.0
        if entry.state in (State.QUEUED, State.FINISHED):
            last = self._last_token.pop(name, None)
            gap_s = 0.0 if last is None else max(0.0, now - last)
            self._with_tokens.pop(name, None)
            self._tokenless.discard(name)
        elif not entry.emitted:
            self._tokenless.add(name)
        self._preempted += event is Event.PREEMPTED
        self._refilled += event is Event.RETRY
        if note and event in (Event.FILL, Event.START):  # with the reason of its decision
            role = PREFILL if event is Event.FILL else DECODE
            self._decided[role, entry.decision.cause] += 1
        if not self._clients:
            return
        self._moments.append(_moment(entry, now, note, gap_s=gap_s))
        if event is Event.FINISH:
            self._ended.append(_ended(entry, now, note))

    def filled_to(self, entry: Entry, tokens: int, now: float) -> None:
        self._backlog.filled_to(entry, tokens)
        if self._clients:
            self._moments.append(replace(_moment(entry, now, ""), tokens=tokens))

    def worker_lost(self, member: Member | None) -> None:
        if member is not None:
            self._lost[member.hello.role] += 1

    def worked(self, member: Member, work: Work | None) -> None:
        """A worker's heartbeat."""
        if work is not None:
            self._works[member.worker] = WorkerWork(member.worker, member.hello.role, work)

    def sampled(self, entry: Entry, times: Sequence[float]) -> None:
        name = entry.id
        if len(entry.emitted) == len(times):  # the request's first ones
            self._tokenless.discard(name)
            if self._clients:
                self._first.append(_first_token(entry))
        self._generated += len(times)
        last = self._last_token.get(name)
        if last is None and self._clients:  # a run's first token ends its prefill
            self._moments.append(_moment(entry, times[0], "", sampled=True))
        for at in times:
            if last is not None:
                gap = at - last if at > last else 0.0  # ages are a worker's word
                self._itl[bisect_left(ITL_BUCKETS_S, gap)] += 1
                self._itl_s += gap
                if gap > STALL_S and self._clients:
                    self._moments.append(_moment(entry, at, "", sampled=True, gap_s=gap))
            last = at
        self._last_token[name] = times[-1]
        if self._clients:
            self._with_tokens[name] = entry

    # ---- sending

    def due(self, now: float) -> float:
        """Seconds until there is something to send."""
        if not self._clients:
            return inf
        waiting = self._moments or self._with_tokens
        return min(self._next_count, self._next_events if waiting else self._next_count) - now

    def updates(self, ledger: Ledger, members: WorkerRegistry, now: float) -> list[Effect]:
        """Observed for every observer, if anything is due."""
        if not self._clients:
            self._clear()
            self._works.clear()  # totals: the next heartbeats bring them again
            return []
        counting = now >= self._next_count
        if not counting and (now < self._next_events or not (self._moments or self._with_tokens)):
            return []
        self._next_events = now + EVENTS_S
        if counting:
            self._next_count = now + COUNT_S
        decoding_now = [
            _moment(each, self._last_token[name], "", sampled=True)
            for name, each in self._with_tokens.items()
        ]
        observed = Observed(
            now,
            tuple(self._moments + decoding_now),
            tuple(self._ended),
            self.counts(ledger, members, now) if counting else None,
            tuple(self._first),
        )
        self._clear()
        if counting:  # also the last report of a worker that is gone, once
            kept = {name: each for name, each in self._works.items() if members.get(name)}
            self._works = kept
        return [To(client, observed) for client in self._clients]

    def _clear(self) -> None:
        self._moments, self._first, self._ended, self._with_tokens = [], [], [], {}

    def counts(self, ledger: Ledger, members: WorkerRegistry, now: float) -> Counts:
        """The router's counts: current ones, and totals since its start."""
        return Counts(
            waiting=ledger.count(*LIVE) - ledger.count(State.DECODING),
            running=ledger.count(*PLACED),
            generated_tokens=self._generated,
            preemptions=self._preempted,
            refills=self._refilled,
            lost_prefill=self._lost[PREFILL],
            lost_decode=self._lost[DECODE] + self._lost[ENGINE],
            late_reports=ledger.late_reports,
            itl=tuple(self._itl),
            itl_s=self._itl_s,
            pools=tuple(_pool(member) for member in members.of(DECODE)),
            backlogs=self._backlog.report(now),
            tokenless=len(self._tokenless),
            works=tuple(self._works.values()),
            router=self._router,
            decided=tuple(Decided(*each, n) for each, n in sorted(self._decided.items())),
        )


class Watchers:
    """Clients that follow the ClusterInfo. What does not change costs nothing, however many they are."""

    def __init__(self) -> None:
        self._clients: dict[str, None] = {}
        self._asking: dict[str, None] = {}  # they get it whatever they know
        self._info: ClusterInfo | None = None  # what all others have
        self._news = False  # it may have changed
        self._next_look = self._next_update = 0.0

    def add(self, client: str) -> None:
        """Send the ClusterInfo to this client, also if it subscribes again."""
        self._clients[client] = self._asking[client] = None

    def remove(self, client: str) -> None:
        self._clients.pop(client, None)
        self._asking.pop(client, None)

    def changed(self) -> None:
        """There are news."""
        self._news = True

    def due(self, now: float) -> float:
        """Seconds until news can be sent."""
        return self._next_update - now if self._news and self._clients else inf

    def updates(self, look: Callable[[], ClusterInfo], now: float, *, news: bool) -> list[Effect]:
        """ClusterInfo for each client that asks or has an older one. `news`: it may have changed, by more
        than time. Then `look` is called at once, but for news not again within UPDATE_S; without any
        every LOOK_S, for what changes by time."""
        if not self._clients:
            self._news = False  # who asks gets what is true then
            return []
        self._news |= news
        timely = now >= (self._next_update if self._news else self._next_look)
        if not timely and not self._asking:
            return []
        if self._news and not self._asking:
            self._next_update = now + UPDATE_S
        self._news = False
        info, before = look(), self._info
        behind = self._clients if info != before else self._asking
        self._info, self._asking, self._next_look = info, {}, now + LOOK_S
        return [To(client, info) for client in behind]


def _moment(
    entry: Entry, at: float, note: str, *, sampled: bool = False, gap_s: float = 0.0
) -> Moment:
    """`sampled`: the current run has tokens. Before that, a run without a receipt counts as filling: the
    decode worker computes its prompt."""
    role = ON_WORKER.get(entry.state)
    worker = entry.prefill if role == PREFILL else entry.decode if role == DECODE else None
    decoding = entry.state is State.DECODING
    filling = decoding and not sampled and entry.receipt is None and entry.unfilled > 0
    generated = (decoding and not filling) or entry.state is State.FINISHED
    receipt = entry.receipt if decoding else None
    return Moment(
        request=entry.id,
        at=at,
        state=State.FILLING.value if filling else entry.state.value,
        worker=worker or "",
        tokens=len(entry.emitted) + (0 if generated else len(entry.prompt_ids)),
        handover_s=receipt.seconds if receipt else 0.0,
        note=note,
        transport=receipt.transport if receipt else "",
        moved_bytes=receipt.moved_bytes if receipt else 0,
        gap_s=gap_s,
        reused=entry.prefill_reused if receipt else 0,
    )


def _first_token(entry: Entry) -> FirstToken:
    """Where decode has filled the prompt, or an engine, that is prefill too."""
    at = entry.first_token if entry.first_token is not None else entry.since
    took = timings(entry, at, 0)
    if entry.receipt is None and len(entry.prompt_ids) - 1 > entry.cached_tokens:
        took = replace(took, prefill_s=took.prefill_s + max(0.0, at - entry.since))
    return FirstToken(
        request=entry.id,
        prompt_tokens=len(entry.prompt_ids),
        transport=entry.transport,
        timings=took,
    )


def _ended(entry: Entry, now: float, reason: str) -> Ended:
    return Ended(
        request=entry.id,
        reason=reason,
        prompt_tokens=len(entry.prompt_ids),
        tokens=len(entry.emitted),
        transport=entry.transport,
        timings=timings(entry, now, 0),
        embedding=bool(entry.pooling),
    )


def _pool(member: Member) -> PoolInfo:
    blocks, pool = member.hello.blocks, member.pool
    if pool is None:
        pool = PoolStats(blocks, 0, 0)
    size = member.hello.block_size
    return PoolInfo(member.worker, blocks, pool.free, pool.cached, pool.quarantined, size)
