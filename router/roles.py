"""Roles: asks role_policy.py who fills a request's prompt, with what the router knows of the workers.

What runs goes on, whatever is decided for the next request: no worker is drained, and none has to know.
"""

from collections.abc import Collection
from dataclasses import replace

from baton.kv.region import Receipt
from baton.pace import Pace, Span
from router.batching import Rules
from router.candidates import prefill_choices
from router.cores import CoreKeeper
from router.ledger import Entry, Ledger
from router.placement import PLACE_PREFILL
from router.reach import Reach
from router.role_policy import Cause, Decision, DecodeSide, PrefillSide, RolePolicy, choose
from router.workers import Member, WorkerRegistry

TRUST = 0.25
"""Part of the last hand-over in what is expected of the next."""


class Roles:
    """For the scheduler, which acts on it."""

    def __init__(
        self,
        ledger: Ledger,
        members: WorkerRegistry,
        rules: Rules,
        reach: Reach,
        cores: CoreKeeper,
    ) -> None:
        self._ledger = ledger
        self._members = members
        self._rules = rules
        self._reach = reach
        self._cores = cores

    def forced(self, entry: Entry, now: float, *, alone: bool) -> Decision | None:
        """The decision where there is no choice. `alone`: no prefill worker can fill anything."""
        if entry.pooling:
            return _REMOTE_EMBEDDING
        if entry.to_be_scored:
            return _LOCAL[Cause.PROMPT_LOGPROBS]
        if entry.tries.local:
            return _LOCAL[Cause.FAILED_FILLS]
        rules, size = self._rules, self._members.block_size
        policy = entry.role_policy or rules.role_policy
        if rules.colocated or policy is RolePolicy.COLOCATED:
            return _LOCAL[Cause.ROLE_POLICY]
        if alone or self._reach.out_of(-(-entry.reach // size), now):
            return _LOCAL[Cause.NO_PREFILL]
        least = max(rules.local_tokens, size if entry.cached_tokens else 0)
        if entry.unfilled <= least:
            return _LOCAL[Cause.SHORT]
        return _SPLIT if policy is RolePolicy.SPLIT else None

    def may_be_remote(self, entry: Entry, now: float, *, alone: bool) -> bool:
        """A prefill worker may have to fill it."""
        decision = self.forced(entry, now, alone=alone)
        return decision is None or decision.remote

    def decide(self, entry: Entry, now: float, *, alone: bool) -> Decision:
        """Who fills this request, whose blocks are granted."""
        decision = self.forced(entry, now, alone=alone)
        if decision is not None:
            return replace(decision, itl_s=self._rules.slo.itl_s or 0.0)
        assert entry.decode is not None
        decode = self._members.get(entry.decode)
        choices = prefill_choices(self._ledger.loads, self._reach.fillers(entry, now))
        name = PLACE_PREFILL(choices, entry.decode)
        prefill = self._members.get(name) if name is not None else None
        if prefill is None:
            return replace(_LOCAL[Cause.NO_PREFILL], itl_s=self._rules.slo.itl_s or 0.0)
        if decode is None or not (decode.speeds and prefill.speeds):
            return _UNMEASURED
        return choose(
            Span(entry.cached_tokens, entry.unfilled),
            self._decode_side(decode, prefill, now),
            self._prefill_side(entry, decode, prefill),
            self._rules.slo,
            waited_s=now - entry.submitted,
        )

    def handed_over(self, entry: Entry, receipt: Receipt) -> None:
        """What a hand-over took, for each token."""
        prefill = self._members.get(entry.prefill) if entry.prefill else None
        if prefill is not None and entry.decode is not None and entry.unfilled > 0:
            took_s = receipt.seconds / entry.unfilled
            before = prefill.handovers.get(entry.decode, took_s)
            prefill.handovers[entry.decode] = before + TRUST * (took_s - before)

    def _decode_side(self, decode: Member, prefill: Member, now: float) -> DecodeSide:
        ledger, name = self._ledger, decode.worker
        busy = ledger.loads.busy
        alone = self._pace(decode, busy | {name})
        beside = self._pace(decode, busy | {name, prefill.worker})
        pace = beside if prefill.worker in busy else alone
        filling = ledger.loads.fills.left(name, now, pace.fill_rate())
        streams = ledger.loads.computing(name) - ledger.loads.fills.count(name)
        idle = decode.idle(self._cores.number(name, frozenset((name,))))
        return DecodeSide(idle, alone, beside, streams, filling)

    def _prefill_side(self, entry: Entry, decode: Member, prefill: Member) -> PrefillSide:
        loads, name = self._ledger.loads, prefill.worker
        pace = self._pace(prefill, loads.busy | {name})
        tokens = entry.unfilled
        return PrefillSide(pace, loads.amounts(name), tokens * _handover_s(decode, prefill))

    def _pace(self, member: Member, busy: Collection[str | None]) -> Pace:
        """With the cores that it has while these workers are busy."""
        return member.pace(self._cores.number(member.worker, busy))


def _handover_s(decode: Member, prefill: Member) -> float:
    """Of one token; before the first one, by what was measured when the way was opened."""
    if (measured := prefill.handovers.get(decode.worker)) is not None:
        return measured
    way = prefill.attached.get(decode.worker)
    if way is None or way.gb_per_s <= 0:
        return 0.0
    return decode.hello.block_bytes / decode.hello.block_size / (way.gb_per_s * 1e9)


_LOCAL = {
    Cause.PROMPT_LOGPROBS: Decision(
        False, Cause.PROMPT_LOGPROBS, "decode fills: prompt logprobs need its logits"
    ),
    Cause.FAILED_FILLS: Decision(
        False, Cause.FAILED_FILLS, "decode fills: its fills failed again and again"
    ),
    Cause.ROLE_POLICY: Decision(
        False, Cause.ROLE_POLICY, "decode fills: decode workers fill every prompt (colocated)"
    ),
    Cause.NO_PREFILL: Decision(
        False, Cause.NO_PREFILL, "decode fills: no prefill worker can fill it now"
    ),
    Cause.SHORT: Decision(False, Cause.SHORT, "decode fills: too few tokens for a hand-over"),
}
_REMOTE_EMBEDDING = Decision(
    True, Cause.EMBEDDING, "prefill fills: only prefill workers compute embeddings"
)
_SPLIT = Decision(
    True, Cause.ROLE_POLICY, "prefill fills: prefill workers fill every prompt (split)"
)
_UNMEASURED = Decision(
    True, Cause.UNMEASURED, "prefill fills: the workers have not told their speed yet"
)
