"""plan_fill(): which prompts the next Fill batch holds. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router.role_policy import NO_SLO, RolePolicy, Slo


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request with its blocks granted, waiting for a Fill batch."""

    run: str
    tokens: int
    since: float


@dataclass(frozen=True, slots=True)
class Rules:
    """How this router schedules."""

    batch_size: int  # requests running at once, hence the size of a Fill batch
    window_s: float  # longest wait of a prompt for others whose blocks are being reserved; 0: none
    token_budget: int  # of a Fill batch
    colocated: bool = False
    local_tokens: int = 0  # prompts with at most so many uncached tokens skip prefill
    role_policy: RolePolicy = RolePolicy.SPLIT
    slo: Slo = NO_SLO  # what the adaptive policy keeps to


def plan_fill(
    waiting: Iterable[Waiting], rules: Rules, *, more_may_come: bool, now: float
) -> list[Waiting]:
    """The next batch, or an empty list if it is better to wait.

    `waiting` is in order of arrival, oldest first; no more of it is read than the batch takes. A batch is
    a prefix of it, so short prompts never starve a long one ahead of them. The first prompt is always
    taken, even if it exceeds the token budget by itself (the prefill worker cuts it into chunks). Without
    `more_may_come` the batch is sent at once, so a lone prompt never waits.
    """
    batch: list[Waiting] = []
    tokens, full = 0, False
    for each in waiting:
        full = bool(batch) and tokens + each.tokens > rules.token_budget
        if full:
            break
        batch.append(each)
        tokens += each.tokens
        full = len(batch) == rules.batch_size
        if full:
            break
    if not batch:
        return []
    window_over = now - batch[0].since >= rules.window_s
    return batch if full or window_over or not more_may_come else []


def fill_due(waiting: Sequence[Waiting], rules: Rules, now: float) -> float | None:
    """Seconds until the window of the oldest closes; None if `waiting` is empty."""
    if not waiting:
        return None
    return max(0.0, waiting[0].since + rules.window_s - now)
