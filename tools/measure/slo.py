"""Latencies of a run: TTFT, ITL, goodput. Pure.

TTFT counts from the planned arrival of a request, not from when a busy client sent it. Otherwise a stall
would hide the queue behind it (coordinated omission).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from baton import table
from baton.wire.records import Timings


@dataclass(frozen=True, slots=True)
class Trace:
    """One request as the client saw it. Times in seconds from the beginning of the run."""

    intended: float
    tokens: tuple[float, ...]  # when each arrived
    timings: Timings
    watched: bool = True
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()

    @property
    def ttft(self) -> float:
        """Time to the first token; infinite if the request was aborted before."""
        return self.tokens[0] - self.intended if self.tokens else inf

    @property
    def tpot(self) -> float:
        """Time per output token after the first: the mean gap, 0 without gaps."""
        later = len(self.tokens) - 1
        return (self.tokens[-1] - self.tokens[0]) / later if later > 0 else 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits: a request meets them with a first token in time and 99 of 100 gaps short enough."""

    ttft_s: float
    itl_s: float

    @classmethod
    def of_idle(cls, ttft_s: float, itl_s: float) -> "Slo":
        """The usual limits: ten times the TTFT and five times the ITL of a request on an idle cluster."""
        return cls(10 * ttft_s, 5 * itl_s)

    def met(self, trace: Trace) -> bool:
        """Whether this request meets the limits."""
        return trace.ttft <= self.ttft_s and percentile(trace.gaps, 99) <= self.itl_s


@dataclass(frozen=True, slots=True)
class Summary:
    """Metrics of one arm, one load, one round. Times in ms, rates in 1/s."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    itl_max: float
    goodput: float
    tokens_per_s: float
    handover_ms: float  # mean of a request
    kv_bytes: int
    moved_bytes: int
    requests: int = 0  # watched
    met: int = 0  # of these, within the SLO
    gaps: int = 0


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; 0 of no values."""
    return table.percentile(sorted(values), percent) if values else 0.0


def summarise(traces: Sequence[Trace], slo: Slo, window: tuple[float, float]) -> Summary:
    """Metrics of the watched requests. Gaps count if they end within `window` (seconds)."""
    watched = [trace for trace in traces if trace.watched]
    begin, end = window
    gaps = [
        later - earlier
        for trace in watched
        for earlier, later in zip(trace.tokens, trace.tokens[1:], strict=False)
        if begin <= later <= end
    ]
    ttfts = [trace.ttft for trace in watched]
    lasted = max((trace.tokens[-1] for trace in traces if trace.tokens), default=0.0)
    tokens = sum(len(trace.tokens) for trace in traces)
    met = sum(map(slo.met, watched))
    handed = [trace.timings.handover_s for trace in traces if trace.timings.kv_bytes]
    return Summary(
        ttft_p50=1e3 * percentile(ttfts, 50),
        ttft_p99=1e3 * percentile(ttfts, 99),
        itl_p50=1e3 * percentile(gaps, 50),
        itl_p99=1e3 * percentile(gaps, 99),
        itl_max=1e3 * max(gaps, default=0.0),
        goodput=met / lasted if lasted else 0.0,
        tokens_per_s=tokens / lasted if lasted else 0.0,
        handover_ms=1e3 * sum(handed) / len(handed) if handed else 0.0,
        kv_bytes=sum(trace.timings.kv_bytes for trace in traces),
        moved_bytes=sum(trace.timings.moved_bytes for trace in traces),
        requests=len(watched),
        met=met,
        gaps=len(gaps),
    )
