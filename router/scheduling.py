"""Scheduler: applies the pure policies to reserve, fill and start requests, and creates the orders."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from math import inf

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
from router.kept import Kept
from router.ledger import Entry, Ledger
from router.placement import PLACE_DECODE, PLACE_PREFILL
from router.reach import Reach
from router.roles import Roles
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
        self._granted: list[str] = []  # runs to decide on, since the last step
        self._full_until: deque[float] = deque()  # Member.full_until of every Deferred, in order
        self._reach = Reach(members)
        self._affinity, self._kept = Affinity(), Kept(rope)
        self.roles = Roles(ledger, members, rules, self._reach, self._kept)
        self._engines = Engines(ledger, members, rules, self._affinity, rope)

    def joined(self, hello: Hello) -> None:
        """The worker may be given requests."""
        if hello.role != ENGINE:  # engines are not chosen by blocks
            self._ledger.loads.joined(hello.worker, hello.blocks if hello.role == DECODE else None)
        (self._kept if hello.role == PREFILL else self._affinity).joined(hello.worker)

    def left(self, worker: str) -> None:
        """The worker is gone."""
        self.decide_again(worker)
        self._ledger.loads.left(worker)
        self._affinity.left(worker)
        self._kept.left(worker)

    def decide_again(self, prefill: str, decode: str | None = None) -> None:
        """The prefill worker cannot fill what it has promised to this decode worker, or (None) to any."""
        loads = self._ledger.loads
        for entry in map(self._ledger.entry, loads.promises.requests(prefill)):
            if decode in (None, entry.decode):
                loads.end_promise(entry.id)
                self._granted.append(entry.run)

    def place(self, now: float) -> list[Effect]:
        """All orders that are possible now."""
        self._alone = self._fill_themselves(now)
        if self._ledger.aside() is not None:
            self._ledger.call_back(self._embeddable(now))
        engines = self._engines.place(self._next, self.start, now)
        return [*engines, *self._reserve(now), *self._start_local(now), *self._fill(now)]

    def due(self, now: float) -> float:
        """Seconds until an order becomes possible by the passing of time alone."""
        while self._full_until and self._full_until[0] <= now:
            self._full_until.popleft()
        waits = [self._full_until[0] - now] if self._full_until else []
        window = fill_due([*islice(self._waiting(now, []), 1)], self._rules, now)
        waits += [self._ledger.queued_due(now), 0.0 if window is None else window]
        return min((wait for wait in waits if wait > 0), default=float("inf"))

    @property
    def cannot_embed(self) -> str:
        """Why this cluster computes no embeddings; empty if it does."""
        return why_no_embeddings(self._members, colocated=self._rules.colocated)

    # ---- blocks

    def _reserve(self, now: float) -> list[Effect]:
        """In the order of the line (line.py): a request that cannot be placed stops it."""
        effects: list[Effect] = []
        while self._ledger.count(*PLACED) < self._rules.batch_size:
            entry = self._next(now)
            if entry is None:
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

    def _next(self, now: float) -> Entry | None:
        """The first of the line, if it may be placed now. Embeddings that no worker can compute are set
        aside: they would stop requests that need no prefill worker."""
        most: float | None = None
        while (entry := self._ledger.next_queued(now)) is not None and entry.pooling:
            most = self._embeddable(now) if most is None else most
            if entry.reach <= most:
                break
            self._ledger.set_aside(entry)
        return None if entry is None or entry.retry_at > now else entry

    def _embeddable(self, now: float) -> float:
        """Tokens of the longest embedding for which workers are there now, busy or not."""
        members = self._members
        if self._alone:
            return 0.0
        reached = [m for m in members.alive(DECODE, now) if members.prefill_reaches(m.worker, now)]
        most = max((each.hello.blocks for each in reached), default=0)
        if most == members.largest_pool:  # what fits nowhere stays in line, to be refused
            return inf if most else 0.0
        return most * members.block_size

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
        members = self._members
        remote = self.roles.may_be_remote(entry, now, alone=self._alone)

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
            self._full_until.append(member.full_until)
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

    def _start_local(self, now: float) -> list[Effect]:
        """What is not started at once is filled remotely, unless all prefill workers get lost."""
        granted, self._granted = self._granted, []
        runs = [entry.run for entry in self._ledger.reserved()] if self._alone else granted
        found = [self._ledger.running(run) for run in dict.fromkeys(runs)]
        reserved = [each for each in found if each is not None and each.state is State.RESERVED]
        alone, settle = self._alone, self.roles.settle
        return [self.start(each, now) for each in reserved if not settle(each, now, alone=alone)]

    def _waiting(self, now: float, stuck: list[Entry]) -> Iterator[Waiting]:
        """What a prefill worker can fill now. What none can is added to `stuck`, as far as is read: in a
        batch it would take the place of what can be filled."""
        fillable = self._reach.fillable(now)
        for entry in self._ledger.reserved():
            if fillable(entry):
                yield Waiting(entry.run, entry.unfilled, entry.since)
            else:
                stuck.append(entry)

    def _fill(self, now: float) -> list[Effect]:
        """A batch waits only for prompts whose blocks are being reserved; later ones form the next."""
        more, stuck = self._ledger.count(State.RESERVING) > 0, list[Entry]()
        batch = plan_fill(self._waiting(now, stuck), self._rules, more_may_come=more, now=now)
        effects = [order for entry in stuck for order in self._move_if_lost(entry, now)]
        for waiting in batch:
            entry = self._ledger.follow(waiting.run, State.RESERVED)
            assert entry is not None
            assert entry.grant is not None
            prefills, able = self._ledger.loads.prefills, self._reach.fillers(entry, now)
            choices = prefill_choices(prefills, able, self._kept.saved(entry))
            worker = PLACE_PREFILL(choices, entry.grant.worker)
            if worker is None:
                continue
            entry.prefill = worker
            self._ledger.apply(entry, Event.FILL, now, note=entry.decision.why)
            floor = self._rope.floor(len(entry.prompt_ids), entry.length)
            ids = entry.token_ids if entry.pooling else entry.token_ids[:-1]
            hashes = self._kept.hashes(entry, self._members.get(worker))
            order = Fill(entry.grant, ids, floor, entry.pooling, entry.params.adapter, hashes)
            effects.append(To(worker, order))
        return effects

    def _move_if_lost(self, entry: Entry, now: float) -> list[Effect]:
        """No prefill worker can fill it now: it is queued again, or keeps its blocks and waits. While
        decode workers fill, an embedding waits without blocks, and its deadline runs."""
        assert entry.decode is not None
        if not (entry.pooling and self._alone) and not self._reach.lost(entry.decode, now):
            return []
        order = To(entry.decode, Cancel(entry.run))
        self._ledger.apply(entry, Event.RETRY, now)
        return [order]

    # ---- decode

    def start(self, entry: Entry, now: float) -> To:
        """Without a receipt the decode worker computes the prompt itself. After a death tokens are not
        buffered, so that a request which kills its workers at some token is known by that place."""
        assert entry.decode is not None
        why = entry.decision.why if entry.receipt is None else ""
        self._ledger.apply(entry, Event.START, now, note=why)
        params = entry.params
        if entry.tries.deaths:
            params = replace(params, stream_interval_s=0.0)
        if entry.scored:  # by an earlier run
            params = replace(params, prompt_logprobs=-1)
        order = Start(
            *(entry.run, entry.token_ids, len(entry.prompt_ids), params),
            receipt=entry.receipt,
            itl_s=entry.decision.itl_s,
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
