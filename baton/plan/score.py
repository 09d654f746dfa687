"""Score: how well a simulated cluster served, at limits of the latencies (SLO). Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.plan.simulation import Answer
from baton.table import percentile


@dataclass(frozen=True, slots=True)
class Score:
    """Latencies in seconds; goodput: requests a second that met both limits."""

    requests: int
    met: int
    goodput: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    failed: int


def meets(answer: Answer, ttft_s: float, itl_s: float) -> bool:
    """The first token is in time, and 99 of 100 tokens come soon enough after the one before."""
    gaps = sorted(answer.gaps_s)
    slow = percentile(gaps, 99) if gaps else 0.0
    return not answer.failed and answer.ttft_s <= ttft_s and slow <= itl_s


def score(answers: Sequence[Answer], ttft_s: float, itl_s: float) -> Score:
    """Of at least one answer."""
    met = sum(meets(each, ttft_s, itl_s) for each in answers)
    lasted = max((each.tokens[-1] for each in answers if each.tokens), default=1.0)
    ttfts = sorted(each.ttft_s for each in answers)
    gaps = sorted(gap for each in answers for gap in each.gaps_s) or [0.0]
    return Score(
        requests=len(answers),
        met=met,
        goodput=met / lasted,
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        failed=sum(bool(each.failed) for each in answers),
    )
