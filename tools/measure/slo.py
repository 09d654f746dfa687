"""Latencies of a run: TTFT, ITL, goodput. Pure.

TTFT counts from the moment a request was meant to arrive, not from when a busy client got round to
sending it: else a stall hides the queue behind it (coordinated omission).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from baton.wire.records import Timings


@dataclass(frozen=True, slots=True)
class Trace:
    """What one request met with. Times in seconds from the beginning of the run."""

    intended: float
    tokens: tuple[float, ...]  # when each arrived
    timings: Timings
    watched: bool = True
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()

    @property
    def ttft(self) -> float:
        """Time to the first token; endless if it was taken back before."""
        return self.tokens[0] - self.intended if self.tokens else inf

    @property
    def tpot(self) -> float:
        """Time per output token after the first: the mean of the gaps, 0 if there is none."""
        later = len(self.tokens) - 1
        return (self.tokens[-1] - self.tokens[0]) / later if later > 0 else 0.0

    @property
    def gaps(self) -> list[float]:
        """Between tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Slo:
    """A request is good if its first token came in time and 99 of 100 of its gaps were short."""

    ttft_s: float
    itl_s: float

    def met(self, trace: Trace) -> bool:
        """By this request."""
        return trace.ttft <= self.ttft_s and percentile(trace.gaps, 99) <= self.itl_s


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm, one load, one round. Times in ms, rates in 1/s."""

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


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, ceil(percent / 100 * len(ordered)) - 1)] if ordered else 0.0


def summarise(traces: Sequence[Trace], slo: Slo, window: tuple[float, float]) -> Summary:
    """Of the watched requests; gaps count that end within `window` (seconds)."""
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
    handed = [trace.timings.handover_s for trace in traces if trace.timings.kv_bytes]
    return Summary(
        ttft_p50=1e3 * percentile(ttfts, 50),
        ttft_p99=1e3 * percentile(ttfts, 99),
        itl_p50=1e3 * percentile(gaps, 50),
        itl_p99=1e3 * percentile(gaps, 99),
        itl_max=1e3 * max(gaps, default=0.0),
        goodput=sum(map(slo.met, watched)) / lasted if lasted else 0.0,
        tokens_per_s=tokens / lasted if lasted else 0.0,
        handover_ms=1e3 * sum(handed) / len(handed) if handed else 0.0,
        kv_bytes=sum(trace.timings.kv_bytes for trace in traces),
        moved_bytes=sum(trace.timings.moved_bytes for trace in traces),
    )
