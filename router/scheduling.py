"""Scheduler: applies the pure policies to reserve, fill and start requests, and creates the orders."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from baton.kv.grant import Grant
from baton.lifecycle import PLACED, Event, State
from baton.rope import FIXED, RopeRule
from baton.wire.messages import Cancel, Fill, Renew, Reserve, Start
from baton.wire.node import Effect, To
from router.affinity import Affinity
from router.batching import Rules, Waiting, fill_due, plan_fill
from router.engines import Engines
from router.hashes import prefix_hashes
from router.ledger import Entry, Ledger
from router.placement import (
    PLACE_DECODE,
    PLACE_PREFILL,
    DecodeChoice,
    PrefillChoice,
    fills_remotely,
)
from router.workers import DECODE, PREFILL, Member, WorkerRegistry

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
        self._affinity = Affinity()
        self._engines = Engines(ledger, members, rules, self._affinity, rope)

    def place(self, now: float) -> list[Effect]:
        """All orders that are possible now."""
        self._alone = self._fill_themselves(now)
        engines = self._engines.place(self.start, now)
        return [*engines, *self._reserve(now), *self._start_local(now), *self._fill(now)]

    def due(self, now: float) -> float:
        """Seconds until an order becomes possible by the passing of time alone."""
        first = self._ledger.next_queued(now)
        waits = [first.retry_at - now] if first and first.retry_at > now else []
        window = fill_due(self._waiting(), self._rules, now)
        if window is not None and window > 0:
            waits.append(window)
        return min(waits, default=float("inf"))

    # ---- blocks

    def _reserve(self, now: float) -> list[Effect]:
        """In the order of the line (line.py): a request that cannot be placed stops it."""
        effects: list[Effect] = []
        while self._ledger.count(*PLACED) < self._rules.batch_size:
            entry = self._ledger.next_queued(now)
            if entry is None or entry.retry_at > now:
                break
            members = self._able(entry, now)
            if not members:
                break
            size = members[0].hello.block_size
            block_hashes = prefix_hashes(entry, size, self._rope)
            wanted = self._wanted(entry, size)
            choices = [self._decode_choice(member, block_hashes[1:]) for member in members]
            worker = PLACE_DECODE(choices, _blocks(wanted, size))
            if worker is None:
                break
            entry.decode, entry.reserved = worker, wanted
            entry.writers = self._writers(worker)
            self._affinity.sent(block_hashes[1:], worker)
            self._ledger.apply(entry, Event.RESERVE, now)
            effects.append(To(worker, Reserve(entry.run, wanted, block_hashes)))
        return effects

    def _writers(self, decode: str) -> frozenset[tuple[str, str]]:
        """The prefill workers that this decode worker is told of before it reads what is sent to it now.
        Only these may write to what it grants then: the blocks of a grant wait in quarantine for none but
        the writers that it knows."""
        prefills = self._members.of(PREFILL)
        return frozenset((p.worker, p.hello.epoch) for p in prefills if decode in p.attached)

    def _wanted(self, entry: Entry, block_size: int) -> int:
        """Tokens to reserve blocks for: the known ones and a block more. A request reserves more
        after each preemption, so that it is not preempted again at once."""
        ahead: int = block_size * AFTER_PREEMPTION**entry.preemptions
        return min(entry.reach, len(entry.token_ids) + ahead)

    def granted(self, entry: Entry, grant: Grant, now: float) -> None:
        """The decode worker has reserved blocks; the grant names the cached prefix."""
        member = self._members.get(grant.worker)
        assert member is not None  # router/reports.py has checked the grant
        entry.grant = grant
        entry.cached_tokens = len(grant.prefix) * member.hello.block_size
        if entry.runs == 1:
            entry.reused_tokens = entry.cached_tokens
        self._ledger.apply(entry, Event.GRANTED, now)

    def _able(self, entry: Entry, now: float) -> list[Member]:
        """Decode workers that accept requests and, if needed, can be written to by a prefill worker."""
        members = [m for m in self._members.alive(DECODE, now) if m.full_until <= now]
        if self._remote(entry):
            reaches = self._members.prefill_reaches
            members = [member for member in members if reaches(member.worker, now)]
        return members

    def _decode_choice(self, member: Member, block_hashes: Sequence[bytes]) -> DecodeChoice:
        """Free blocks are counted less one for each request there: it will grow soon."""
        here = [e for e in self._ledger.in_state(*PLACED) if e.decode == member.worker]
        held = sum(_blocks(entry.holds, member.hello.block_size) + 1 for entry in here)
        cached = self._affinity.there(block_hashes, member.worker) / max(1, len(block_hashes))
        return DecodeChoice(member.worker, member.hello.blocks - held, len(here), cached)

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
        entry = self._ledger.next_queued(now)
        members = list(self._members.of(DECODE))
        if entry is None or not members:
            return None
        biggest = max(member.hello.blocks for member in members)
        blocks = _blocks(entry.reach, members[0].hello.block_size)
        if blocks <= biggest:
            return None
        return entry, (
            f"prompt and generation need {blocks} KV blocks, the largest pool here has {biggest}; "
            "shorten one of them or give the decode worker more KV memory"
        )

    # ---- prefill

    def _remote(self, entry: Entry) -> bool:
        if entry.to_be_scored or entry.tries.local or self._alone:  # only decode computes logits
            return False
        rules, local = self._rules, self._rules.local_tokens
        member = self._members.get(entry.decode) if entry.decode else None
        if entry.cached_tokens and member is not None:
            local = max(local, member.hello.block_size)  # too little for a hand-over
        return fills_remotely(entry.unfilled, colocated=rules.colocated, local_tokens=local)

    def _start_local(self, now: float) -> list[Effect]:
        reserved = self._ledger.in_state(State.RESERVED)
        return [self.start(entry, now) for entry in reserved if not self._remote(entry)]

    def _waiting(self) -> list[Waiting]:
        return [
            Waiting(entry.run, entry.unfilled, entry.since)
            for entry in self._ledger.in_state(State.RESERVED)
        ]

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
            worker = PLACE_PREFILL(self._prefill_choices(entry, now), entry.grant.worker)
            if worker is None:
                moved += self._move_if_out_of_reach(entry, entry.grant.worker, now)
                continue
            entry.prefill = worker
            self._ledger.apply(entry, Event.FILL, now)
            floor = self._rope.floor(len(entry.prompt_ids), entry.length)
            fills.append(To(worker, Fill(entry.grant, entry.token_ids[:-1], floor)))
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

    def _prefill_choices(self, entry: Entry, now: float) -> list[PrefillChoice]:
        filling = self._ledger.in_state(State.FILLING)
        return [
            PrefillChoice(
                member.worker,
                sum(e.unfilled for e in filling if e.prefill == member.worker),
                member.attached.keys(),
            )
            for member in self._members.alive(PREFILL, now)
            if (member.worker, member.hello.epoch) in entry.writers
        ]

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
