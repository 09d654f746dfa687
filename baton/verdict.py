"""Verdict: one line that says what bounds this traffic, computed from recently ended requests.

Checks in order: failures, stalls, a full KV pool, the parts of TTFT, and whether disaggregation helps for
prompts of this length. Every sentence includes the figure behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

RECENT_S = 60.0
FAILED_SHARE = 0.01  # of the requests: worth reporting
SLOW_TTFT = 2.0  # times the cost of prefill and one decode step
BOUND_SHARE = 0.4  # of TTFT: a smaller part is not its bound
SHORT_PROMPT = 64  # tokens: prefill of fewer costs about as much as a decode step
LONG_PROMPT = 512  # tokens: prefill of more delays decode steps on the same device
STALL_SHARE = 0.05  # of decode time


@dataclass(frozen=True, slots=True)
class Facts:
    """One request that has ended. Seconds."""

    good: bool
    prompt_tokens: int
    tokens: int
    queue_s: float
    prefill_s: float
    handover_s: float
    decode_s: float
    ttft_s: float
    retries: int = 0
    preemptions: int = 0
    stalled_s: float = 0.0


def verdict(recent: Sequence[Facts], running: int = 0, waiting: int = 0) -> str:
    """One line, shorter than 160 characters. `recent`: the requests that ended in the last RECENT_S;
    `running`, `waiting`: how many do now."""
    if not recent and (running or waiting):
        live, does = (running, "run") if running else (waiting, "wait")
        told = f"1 request {does}s" if live == 1 else f"{live:,} requests {does}"
        nothing = "" if running else ", none runs"
        return f"{told}{nothing}; none has ended in the last {RECENT_S:.0f} s."
    if not recent:
        return f"No request has ended in the last {RECENT_S:.0f} s."
    for look in (_failures, _stalls, _room, _ttft, _split):
        if line := look(recent):
            return line
    return "Balanced: nothing stands out."


def _failures(recent: Sequence[Facts]) -> str:
    failed = sum(not each.good for each in recent)
    retried = sum(each.retries > 0 for each in recent)
    if failed > FAILED_SHARE * len(recent):
        return f"{failed:,} of the last {len(recent):,} requests did not end well."
    if retried > FAILED_SHARE * len(recent):
        return (
            f"{retried:,} of the last {len(recent):,} requests lost a worker and went on elsewhere."
        )
    return ""


def _stalls(recent: Sequence[Facts]) -> str:
    stalled, decode = sum(f.stalled_s for f in recent), sum(f.decode_s for f in recent)
    if stalled <= STALL_SHARE * decode or not decode:
        return ""
    share = min(1.0, stalled / decode)
    return f"ITL suffers from stalls: {share:.0%} of decode time had no token for long."


def _room(recent: Sequence[Facts]) -> str:
    preempted = sum(each.preemptions > 0 for each in recent)
    if preempted <= FAILED_SHARE * len(recent):
        return ""
    return (
        f"The KV pool is too small: {preempted / len(recent):.0%} of requests gave way and began "
        "again."
    )


def _ttft(recent: Sequence[Facts]) -> str:
    spoken = [each for each in recent if each.tokens > 0 and each.ttft_s > 0]
    total = sum(each.ttft_s for each in spoken)
    step = sum(f.decode_s for f in spoken) / max(1, sum(f.tokens for f in spoken))
    floor = sum(f.prefill_s + f.handover_s + step for f in spoken)
    if not spoken or total <= SLOW_TTFT * floor:
        return ""
    parts = {
        "the queue": sum(f.queue_s for f in spoken),
        "prefill": sum(f.prefill_s for f in spoken),
        "the hand-over": sum(f.handover_s for f in spoken),
    }
    name = max(parts, key=lambda each: parts[each])
    share = min(1.0, parts[name] / total)
    if share < BOUND_SHARE:
        return ""
    ways = {
        "the queue": "more decode room (--max-num-seqs) or more workers help",
        "prefill": "more prefill workers help",
        "the hand-over": "look at the KV path",
    }
    return f"TTFT is bound by {name}: {share:.0%} of it; {ways[name]}."


def _split(recent: Sequence[Facts]) -> str:
    prompts = sorted(each.prompt_tokens for each in recent)
    longest, middle = prompts[-1], prompts[len(prompts) // 2]
    if longest < SHORT_PROMPT:
        return (
            f"P/D would not help this traffic: prompts are no longer than {longest:,} tokens, about "
            "a decode step's work."
        )
    prefill, decode = sum(f.prefill_s for f in recent), sum(f.decode_s for f in recent)
    share = prefill / max(prefill + decode, 1e-9)
    if middle >= LONG_PROMPT:
        return (
            f"P/D helps this traffic: half of the prompts have {middle:,} tokens or more, and their "
            f"prefill ({share:.0%} of the work) holds up no decode step."
        )
    return f"Balanced: prefill is {share:.0%} of the work, the median prompt {middle:,} tokens."
