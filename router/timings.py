"""timings(): where a request's time went, read off the ledger's entry."""

from baton.lifecycle import State
from baton.wire.records import Timings
from router.ledger import Entry


def timings(entry: Entry, now: float, kv_bytes_per_token: int) -> Timings:
    """Where the request's time went, over all its runs."""
    spent = {state: entry.spent.get(state, 0.0) for state in State}
    filled_tokens = len(entry.prompt_ids) - 1 - entry.reused_tokens
    first = entry.first_token if entry.first_token is not None else now
    return Timings(
        queue_s=spent[State.QUEUED] + spent[State.RESERVED],
        reserve_s=spent[State.RESERVING],
        prefill_s=max(0.0, spent[State.FILLING] - entry.handover_s),
        handover_s=entry.handover_s,
        decode_s=spent[State.DECODING],
        detokenize_s=entry.detokenize_s,
        ttft_s=first - entry.submitted,
        total_s=now - entry.submitted,
        kv_bytes=filled_tokens * kv_bytes_per_token,
        moved_bytes=entry.moved_bytes,
        retries=max(0, entry.runs - 1 - entry.preemptions - entry.outgrown),
        preemptions=entry.preemptions,
        cached_tokens=entry.reused_tokens,
        prefill_reused_tokens=entry.prefill_reused,
    )
