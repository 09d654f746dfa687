"""Scheduler: applies the pure policies to reserve, fill and start requests, and creates the orders."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from baton.kv.grant import Grant
from baton.lifecycle import PLACED, Event, State
from baton.rope import FIXED, RopeRule
from baton.wire.messages import Cancel, Fill, Hello, Renew, Reserve, Start
from baton.wire.node import Effect, To
from router.affinity import Affinity
from router.batching import Rules, Waiting, fill_due, plan_fill
from router.candidates import Able, decode_choices, prefill_choices
from router.embedding import why_no_embeddings
from router.engines import Engines
from router.hashes import prefix_hashes
from router.ledger import Entry, Ledger
from router.placement import PLACE_DECODE, PLACE_PREFILL, fills_remotely
from router.workers import DECODE, ENGINE, PREFILL, Member, WorkerRegistry

DEFERRED_S = 0.02
"""Delay before a decode worker that deferred a run is asked again: blocks may leave quarantine."""

AFTER_PREEMPTION = 4
"""A preempted request reserves so many times more blocks ahead than the time before."""


class Scheduler:
    """Reserves, fills and starts. The ledger's states are its only memory."""

    def __init__(
        self,
        ledger: Ledger,
        members: WorkerRegistry,
        rules: Rules,
        fill_themselves: Callable[[float], bool],
        rope: RopeRule = FIXED,
    ) -> None:
        """`fill_themselves`: whether decode workers fill now, because no prefill worker can."""
        self._ledger = ledger
        self._members = members
        self._rules = rules
        self._fill_themselves = fill_themselves
        self._rope = rope
        self._alone = False  # at this step
        self._granted: list[str] = []  # runs, since the last step
        self._affinity = Affinity()
        self._engines = Engines(ledger, members, rules, self._affinity, rope)

    def joined(self, hello: Hello) -> None:
        """The worker may be given requests."""
        if hello.role != ENGINE:  # engines are not chosen by blocks
            self._ledger.loads.joined(hello.worker, hello.blocks if hello.role == DECODE else None)
        if hello.role != PREFILL:
            self._affinity.joined(hello.worker)

    def left(self, worker: str) -> None:
        """The worker is gone."""
        self._ledger.loads.left(worker)
        self._affinity.left(worker)

    def place(self, now: float) -> list[Effect]:
        """All orders that are possible now."""
        self._alone = self._fill_themselves(now)
        engines = self._engines.place(self.start, now)
        return [*engines, *self._reserve(now), *self._start_local(now), *self._fill(now)]

    def due(self, now: float) -> float:
        """Seconds until an order becomes possible by the passing of time alone."""
        first = self._ledger.next_queued(now)
        waits = [first.retry_at - now] if first and first.retry_at > now else []
        window = fill_due([*islice(self._waiting(), 1)], self._rules, now)
        if window is not None and window > 0:
            waits.append(window)
        return min(waits, default=float("inf"))

    @property
    def cannot_embed(self) -> str:
        """Why this cluster computes no embeddings; empty if it does."""
        return why_no_embeddings(self._members, colocated=self._rules.colocated)

    # ---- blocks

    def _reserve(self, now: float) -> list[Effect]:
        """In the order of the line (line.py): a request that cannot be placed stops it."""
        effects: list[Effect] = []
        while self._ledger.count(*PLACED) < self._rules.batch_size:
            entry = self._ledger.next_queued(now)
            if entry is None or entry.retry_at > now:
                break
            size = self._members.block_size
            block_hashes = prefix_hashes(entry, size, self._rope)
            wanted = self._wanted(entry, size)
            choices = decode_choices(
                self._ledger.loads,
                self._able(entry, now),
                blocks=_blocks(wanted, size),
                cached=self._affinity.shares(block_hashes[1:]),
            )
            worker = PLACE_DECODE(choices, _blocks(wanted, size))
            if worker is None:
                break
            entry.decode, entry.reserved, entry.block_size = worker, wanted, size
            entry.writers = self._members.writers(worker)
            self._affinity.sent(block_hashes[1:], worker)
            self._ledger.apply(entry, Event.RESERVE, now)
            effects.append(To(worker, Reserve(entry.run, wanted, block_hashes)))
        return effects

    def _wanted(self, entry: Entry, block_size: int) -> int:
        """Tokens to reserve blocks for: the known ones and a block more. A request reserves more
        after each preemption, so that it is not preempted again at once."""
        ahead: int = block_size * AFTER_PREEMPTION**entry.preemptions
        return min(entry.reach, entry.length + ahead)

    def granted(self, entry: Entry, grant: Grant, now: float) -> None:
        """The decode worker has reserved blocks; the grant names the cached prefix."""
        member = self._members.get(grant.worker)
        assert member is not None  # router/reports.py has checked the grant
        entry.grant = grant
        entry.cached_tokens = len(grant.prefix) * member.hello.block_size
        if entry.runs == 1:
            entry.reused_tokens = entry.cached_tokens
        self._ledger.apply(entry, Event.GRANTED, now)
        self._granted.append(entry.run)

    def _able(self, entry: Entry, now: float) -> Able:
        """Decode workers that accept requests and, if needed, can be written to by a prefill worker."""
        members, remote = self._members, self._remote(entry, now)

        def able(worker: str) -> Member | None:
            member = members.get(worker)
            if member is None or member.full_until > now or not member.accepts(now):
                return None
            return member if not remote or members.prefill_reaches(worker, now) else None

        return able

    def deferred(self, entry: Entry, now: float) -> None:
        """The pool had no room (the router does not see its quarantine): back to the queue."""
        member = self._members.get(entry.decode) if entry.decode else None
        if member is not None:
            member.full_until = now + DEFERRED_S
        entry.retry_at = now + DEFERRED_S
        self._ledger.apply(entry, Event.DEFERRED, now)

    def renew_leases(self) -> list[Effect]:
        """For the grants that are not started yet."""
        waiting: dict[str, list[str]] = {}
        for entry in self._ledger.in_state(State.RESERVED, State.FILLING):
            assert entry.decode is not None
            waiting.setdefault(entry.decode, []).append(entry.run)
        return [To(decode, Renew(tuple(runs))) for decode, runs in waiting.items()]

    def never_fits(self, now: float) -> tuple[Entry, str] | None:
        """The first queued request and the reason, if no pool here could ever hold it."""
        entry, biggest = self._ledger.next_queued(now), self._members.largest_pool
        if entry is None or not biggest:
            return None
        blocks = _blocks(entry.reach, self._members.block_size)
        if blocks <= biggest:
            return None
        return entry, (
            f"prompt and generation need {blocks} KV blocks, the largest pool here has {biggest}; "
            "shorten one of them or give the decode worker more KV memory"
        )

    # ---- prefill

    def _remote(self, entry: Entry, now: float) -> bool:
        if entry.pooling:  # only prefill computes these
            return True
        if entry.to_be_scored or entry.tries.local or self._alone:  # only decode computes logits
            return False
        if self._out_of_reach(entry, now):
            return False
        rules, local = self._rules, self._rules.local_tokens
        member = self._members.get(entry.decode) if entry.decode else None
        if entry.cached_tokens and member is not None:
            local = max(local, member.hello.block_size)  # too little for a hand-over
        return fills_remotely(entry.unfilled, colocated=rules.colocated, local_tokens=local)

    def _out_of_reach(self, entry: Entry, now: float) -> bool:
        """No prefill worker can write to a pool that is large enough: all these ways are down."""
        members = self._members
        if not len(members.ways):
            return False
        blocks = _blocks(entry.reach, members.block_size)
        prefills = members.alive(PREFILL, now)
        fitting = [each.worker for each in members.of(DECODE) if each.hello.blocks >= blocks]
        return all(decode in prefill.failed for decode in fitting for prefill in prefills)

    def _start_local(self, now: float) -> list[Effect]:
        """What is not started at once is filled remotely, unless all prefill workers get lost."""
        granted, self._granted = self._granted, []
        runs = [entry.run for entry in self._ledger.reserved()] if self._alone else granted
        found = [self._ledger.running(run) for run in runs]
        reserved = [each for each in found if each is not None and each.state is State.RESERVED]
        return [self.start(entry, now) for entry in reserved if not self._remote(entry, now)]

    def _waiting(self) -> Iterator[Waiting]:
        reserved = self._ledger.reserved()
        return (Waiting(entry.run, entry.unfilled, entry.since) for entry in reserved)

    def _fill(self, now: float) -> list[Effect]:
        """A batch waits only for prompts whose blocks are being reserved; later ones form the next."""
        more = self._ledger.count(State.RESERVING) > 0
        batch = plan_fill(self._waiting(), self._rules, more_may_come=more, now=now)
        fills: list[Effect] = []
        moved: list[Effect] = []
        for waiting in batch:
            entry = self._ledger.follow(waiting.run, State.RESERVED)
            assert entry is not None
            assert entry.grant is not None
            choices = prefill_choices(self._ledger.loads, self._may_fill(entry, now))
            worker = PLACE_PREFILL(choices, entry.grant.worker)
            if worker is None:
                moved += self._move_if_out_of_reach(entry, entry.grant.worker, now)
                continue
            entry.prefill = worker
            self._ledger.apply(entry, Event.FILL, now)
            floor = self._rope.floor(len(entry.prompt_ids), entry.length)
            ids = entry.token_ids if entry.pooling else entry.token_ids[:-1]
            fills.append(To(worker, Fill(entry.grant, ids, floor, entry.pooling)))
        return moved + fills

    def _move_if_out_of_reach(self, entry: Entry, decode: str, now: float) -> list[Effect]:
        """No prefill worker may write to its blocks now. If all failed to attach, or one attached after
        they were reserved, the request is queued again; otherwise it keeps its blocks and waits."""
        prefills = self._members.alive(PREFILL, now)
        later = any(decode in prefill.attached for prefill in prefills)
        if not later and not (prefills and all(decode in prefill.failed for prefill in prefills)):
            return []
        order = To(decode, Cancel(entry.run))
        self._ledger.apply(entry, Event.RETRY, now)
        return [order]

    def _may_fill(self, entry: Entry, now: float) -> Able:
        """Prefill workers that accept work and may write to the blocks of this entry."""
        decode, members = entry.decode, self._members

        def able(worker: str) -> Member | None:
            member = members.get(worker)
            if member is None or (worker, member.hello.epoch) not in entry.writers:
                return None
            return member if decode in member.attached and member.accepts(now) else None

        return able

    # ---- decode

    def start(self, entry: Entry, now: float) -> To:
        """Without a receipt the decode worker computes the prompt itself. After a death tokens are not
        buffered, so that a request which kills its workers at some token is known by that place."""
        assert entry.decode is not None
        self._ledger.apply(entry, Event.START, now)
        params = entry.params
        if entry.tries.deaths:
            params = replace(params, stream_interval_s=0.0)
        if entry.scored:  # by an earlier run
            params = replace(params, prompt_logprobs=-1)
        order = Start(
            entry.run, entry.token_ids, len(entry.prompt_ids), params, receipt=entry.receipt
        )
        if entry.receipt is not None:
            entry.transport = entry.receipt.transport
        return To(entry.decode, order)

    def kv_bytes_per_token(self, entry: Entry) -> int:
        """KV bytes one token of this request takes in its pool; 0 if it was never placed."""
        member = self._members.get(entry.decode) if entry.decode else None
        return member.hello.block_bytes // member.hello.block_size if member else 0


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
