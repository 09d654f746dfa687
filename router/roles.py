"""Roles: asks role_policy.py who fills a request's prompt, with what the router knows of the workers.

What runs goes on, whatever is decided for the next request: no worker is drained, and none has to know.
"""

from dataclasses import replace

from baton.pace import Span
from baton.wire.messages import Filled
from router.batching import Rules
from router.candidates import prefill_choices
from router.kept import Kept
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
        kept: Kept,
    ) -> None:
        self._ledger = ledger
        self._members = members
        self._rules = rules
        self._reach = reach
        self._kept = kept

    def forced(self, entry: Entry, now: float, *, alone: bool) -> Decision | None:
        """The decision where there is no choice. `alone`: no prefill worker can fill anything."""
        if entry.pooling:
            return _REMOTE_EMBEDDING
        if entry.to_be_scored:
            return _LOCAL[Cause.PROMPT_LOGPROBS]
        tries = entry.tries
        if tries.local:
            failed = f"{tries.refills} fills of it failed, {tries.detours} were lost on their way"
            return Decision(False, Cause.FAILED_FILLS, f"decode fills: {failed}")
        rules, size = self._rules, self._members.block_size
        policy = entry.role_policy or rules.role_policy
        if rules.colocated or policy is RolePolicy.COLOCATED:
            return _LOCAL[Cause.ROLE_POLICY]
        if alone or self._reach.out_of(-(-entry.reach // size), now):
            return _LOCAL[Cause.NO_PREFILL]
        least = max(rules.local_tokens, size if entry.cached_tokens else 0)
        if entry.unfilled <= least:
            short = f"{entry.unfilled:,} tokens, and up to {least:,} are not worth a hand-over"
            return Decision(False, Cause.SHORT, f"decode fills: {short}")
        return _SPLIT if policy is RolePolicy.SPLIT else None

    def may_be_remote(self, entry: Entry, now: float, *, alone: bool) -> bool:
        """A prefill worker may have to fill it."""
        decision = self.forced(entry, now, alone=alone)
        return decision is None or decision.remote

    def settle(self, entry: Entry, now: float, *, alone: bool) -> bool:
        """Decide who fills this request, whose blocks are granted: whether a prefill worker does. What is
        promised to one counts in the next decision."""
        entry.decision, prefill = self._decided(entry, now, alone=alone)
        if entry.decision.remote:
            self._ledger.loads.promised(entry.id, prefill, entry.unfilled)
        return entry.decision.remote

    def decide(self, entry: Entry, now: float, *, alone: bool) -> Decision:
        """The same without any effect."""
        return self._decided(entry, now, alone=alone)[0]

    def _decided(self, entry: Entry, now: float, *, alone: bool) -> tuple[Decision, str | None]:
        """The decision, and the prefill worker with which it was made."""
        decision = self.forced(entry, now, alone=alone)
        if decision is not None:
            decision = replace(decision, itl_s=self._rules.slo.itl_s or 0.0)
            return decision, self._filler(entry, now) if decision.remote else None
        name = self._filler(entry, now)
        decode, prefill = (
            self._members.get(each) if each else None for each in (entry.decode, name)
        )
        if prefill is None or decode is None:
            none = _LOCAL[Cause.NO_PREFILL]
            return replace(none, itl_s=self._rules.slo.itl_s or 0.0), None
        if not (decode.speeds and prefill.speeds):
            return _UNMEASURED, name
        decision = choose(
            Span(entry.cached_tokens, entry.unfilled),
            self._decode_side(decode, prefill, now),
            self._prefill_side(entry, decode, prefill),
            self._rules.slo,
            waited_s=now - entry.submitted,
        )
        return decision, name

    def _filler(self, entry: Entry, now: float) -> str | None:
        """The prefill worker that will have the least to do, of those that can fill this request."""
        assert entry.decode is not None
        able = self._reach.fillers(entry, now)
        choices = prefill_choices(self._ledger.loads.expected, able, self._kept.saved(entry))
        return PLACE_PREFILL(choices, entry.decode)

    def handed_over(self, entry: Entry, filled: Filled) -> None:
        """What a hand-over took, for each token, and what was reused."""
        prefill, receipt = (
            self._members.get(entry.prefill) if entry.prefill else None,
            filled.receipt,
        )
        if prefill is not None:
            self._kept.filled(entry, prefill, filled.reused)
        if prefill is not None and entry.decode is not None and entry.unfilled > 0:
            took_s = receipt.seconds / entry.unfilled
            before = prefill.handovers.get(entry.decode, took_s)
            prefill.handovers[entry.decode] = before + TRUST * (took_s - before)

    def _decode_side(self, decode: Member, prefill: Member, now: float) -> DecodeSide:
        loads, name = self._ledger.loads, decode.worker
        streams = loads.computing(name) - loads.fills.count(name)
        alone = decode.pace_of(streams, loads.soon.cores(name))
        beside = decode.pace_of(streams, loads.soon.cores(name, prefill.worker))
        pace = beside if prefill.worker in loads.soon else alone
        filling = loads.fills.left(name, now, pace.fill_rate())
        idle = decode.pace_idle(loads.soon.alone(name))
        return DecodeSide(idle, alone, beside, streams, filling)

    def _prefill_side(self, entry: Entry, decode: Member, prefill: Member) -> PrefillSide:
        loads, name = self._ledger.loads, prefill.worker
        pace = prefill.pace(loads.soon.cores(name))
        filling = loads.amounts(name) + loads.promises.amounts(name)
        handover_s = entry.unfilled * _handover_s(decode, prefill)
        return PrefillSide(pace, filling, handover_s, self._kept.known(entry, prefill))


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
    Cause.ROLE_POLICY: Decision(
        False, Cause.ROLE_POLICY, "decode fills: decode workers fill every prompt (colocated)"
    ),
    Cause.NO_PREFILL: Decision(
        False, Cause.NO_PREFILL, "decode fills: no prefill worker can fill it now"
    ),
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
