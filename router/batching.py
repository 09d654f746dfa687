"""plan_fill(): who is filled next. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request with its blocks granted, waiting for a Fill batch."""

    run: str
    tokens: int
    since: float


@dataclass(frozen=True, slots=True)
class FillRule:
    """When a batch is full: by requests, by tokens, or by the oldest one's patience."""

    window_s: float  # how long the router waits for company that is on its way; 0: not at all
    batch_size: int
    token_budget: int


def plan_fill(
    waiting: Sequence[Waiting], rule: FillRule, *, more_may_come: bool, now: float
) -> list[Waiting]:
    """The next batch, or an empty list if it is better to wait.

    `waiting` stands in the order in which they came, here and in fill_due(): the first is the oldest.
    First come, first served: a batch is a prefix of the line, so a long prompt is never starved by
    short ones behind it. The first one always goes, even if it alone exceeds the token budget (the
    prefill worker cuts it into chunks). The line goes at once when nobody is on the way who could
    join it (`more_may_come` is False), so one that is alone never waits.
    """
    if not waiting:
        return []
    batch = [waiting[0]]
    tokens = waiting[0].tokens
    for each in waiting[1 : rule.batch_size]:
        if tokens + each.tokens > rule.token_budget:
            break
        batch.append(each)
        tokens += each.tokens
    full = len(batch) == rule.batch_size or len(batch) < len(waiting)
    patience_over = now - waiting[0].since >= rule.window_s
    return batch if full or patience_over or not more_may_come else []


def fill_due(waiting: Sequence[Waiting], rule: FillRule, now: float) -> float | None:
    """Seconds until the window of the oldest one closes; None if nobody waits."""
    if not waiting:
        return None
    return max(0.0, waiting[0].since + rule.window_s - now)
