"""Metrics for Prometheus at /metrics: vLLM's names under our prefix, plus those of the KV hand-over.

A request is observed when it ends, whichever client sent it. The router's counts are exported as last
received. https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from baton.server.admission import Admission
from baton.wire.messages import ClusterInfo
from baton.wire.records import ITL_BUCKETS_S, Counts, Ended

PREFIX = "baton:"
GOOD = ("stop", "length")
LATENCIES_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
HANDOVERS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

TIMES = {  # name: help, the field of Timings
    "time_to_first_token_seconds": ("From submission to the first token.", "ttft_s"),
    "e2e_request_latency_seconds": ("From submission to the end.", "total_s"),
    "request_queue_time_seconds": ("Waiting for room, or for a batch to fill.", "queue_s"),
    "request_prefill_time_seconds": ("Prefill, hand-over apart.", "prefill_s"),
    "request_decode_time_seconds": ("Decode, from Start to the end.", "decode_s"),
}


class Metrics:
    """One model's metrics. As a collector of its own registry it exports the router's counts."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.counts: Counts | None = None
        self.info: ClusterInfo | None = None
        self.router_restarts = 0
        self.admission: Admission | None = None
        self._rejections = self._counter("admission_rejections", "Rejected for now.", "reason")
        self._times = {
            name: self._histogram(name, text, LATENCIES_S) for name, (text, _) in TIMES.items()
        }
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Decode time by tokens.", LATENCIES_S
        )
        self._handover = self._histogram("kv_transfer_seconds", "Hand-over.", HANDOVERS_S)
        self._prompt_lengths = self._histogram("request_prompt_tokens", "Prompt tokens.", TOKENS)
        self._answer_lengths = self._histogram(
            "request_generation_tokens", "Generated tokens.", TOKENS
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self._cached = self._counter("prefix_cache_hits", "Prompt tokens whose KV was cached.")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._success = self._counter("request_success", "Succeeded.", "finished_reason")
        self._failed = self._counter("request_failure", "Failed.", "reason")
        self._bytes = self._counter("kv_transfer_bytes", "KV bytes copied.", "transport")
        self._retries = self._counter("request_retries", "Runs restarted after a loss.")
        self.registry.register(self)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        names = ("model_name", *labels)
        counter = Counter(PREFIX + name, text, names, registry=self.registry)
        if not labels:
            counter.labels(self._model)
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            PREFIX + name, text, ("model_name",), registry=self.registry, buckets=buckets
        )
        histogram.labels(self._model)
        return histogram

    def rejected(self, reason: str) -> None:
        """A request was answered with 429 or 503."""
        self._rejections.labels(self._model, reason).inc()

    def ended(self, ended: Ended) -> None:
        """A request has ended."""
        model, timings = self._model, ended.timings
        good = ended.reason in GOOD
        (self._success if good else self._failed).labels(model, ended.reason).inc()
        self._prompt.labels(model).inc(ended.prompt_tokens)
        self._queried.labels(model).inc(ended.prompt_tokens)
        self._cached.labels(model).inc(timings.cached_tokens)
        self._retries.labels(model).inc(timings.retries)
        if ended.transport:
            self._handover.labels(model).observe(timings.handover_s)
            self._bytes.labels(model, ended.transport).inc(timings.moved_bytes)
        if not good:
            return
        for name, (_, field) in TIMES.items():
            self._times[name].labels(model).observe(getattr(timings, field))
        self._prompt_lengths.labels(model).observe(ended.prompt_tokens)
        self._answer_lengths.labels(model).observe(ended.tokens)
        if ended.tokens > 1:
            spent = (timings.total_s - timings.ttft_s) / (ended.tokens - 1)
            self._per_token.labels(model).observe(max(0.0, spent))

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    # ---- the router's counts, as last received

    def describe(self) -> list[Metric]:
        """Empty, because the names are known only with the first counts."""
        return []

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        labels = ("model_name", "role", "worker")
        up = GaugeMetricFamily(PREFIX + "worker_up", "1: gets work.", labels=labels)
        for each in self.info.workers if self.info else ():
            name = each.worker.partition(".")[0]
            up.add_metric([self._model, each.role, name], each.state == "alive")
        yield up
        yield self._gauge("router_up", "1: the router answers.", self.info is not None)
        yield self._count("router_losses", "Routers lost.", self.router_restarts)
        if self.admission is not None:
            in_lines = self.admission.in_lines
            yield self._gauge("num_requests_in_lines", "Behind others of one request.", in_lines)
            waiting = self.admission.waiting
            yield self._gauge("num_requests_admitted", "Here, without a token yet.", waiting)
        counts = self.counts
        if counts is None:
            return
        pools = counts.pools
        used = sum(pool.blocks - pool.free for pool in pools)
        total = sum(pool.blocks for pool in pools)
        cached = sum(pool.cached for pool in pools)
        quarantined = sum(pool.quarantined for pool in pools)
        yield self._gauge("num_requests_running", "On a worker.", counts.running)
        yield self._gauge("num_requests_waiting", "Without a decode step yet.", counts.waiting)
        yield self._gauge("kv_cache_usage_perc", "Blocks held, of all.", used / max(total, 1))
        yield self._gauge("kv_blocks_leased", "Blocks held by requests.", used)
        yield self._gauge("kv_blocks", "Blocks of all pools.", total)
        yield self._gauge("kv_blocks_cached", "Free blocks that may be used again.", cached)
        yield self._gauge("kv_blocks_quarantined", "Blocks a writer may still reach.", quarantined)
        yield from self._backlogs(counts)
        yield self._count("generation_tokens", "Generated tokens.", counts.generated_tokens)
        yield self._count("num_preemptions", "Preempted in a full pool.", counts.preemptions)
        yield self._count(
            "late_reports",
            "Reports on runs that were over, or by workers given up.",
            counts.late_reports,
        )
        refilled = {"refilled": counts.refills}
        yield self._count("kv_transfer_failures", "KV that was filled again.", refilled, "reason")
        lost = {"prefill": counts.lost_prefill, "decode": counts.lost_decode}
        yield self._count("workers_lost", "Workers that died or were given up.", lost, "role")
        name, running, buckets = PREFIX + "inter_token_latency_seconds", 0, []
        for end, number in zip((*map(str, ITL_BUCKETS_S), "+Inf"), counts.itl, strict=True):
            running += number
            buckets.append((end, running))
        itl = HistogramMetricFamily(name, "Between tokens.", labels=("model_name",))
        itl.add_metric([self._model], buckets, counts.itl_s)
        yield itl

    def _backlogs(self, counts: Counts) -> Iterator[Metric]:
        """What waits for each role: what an autoscaler acts on."""
        for name, text, field in (
            ("backlog_requests", "Requests that wait for a worker of the role.", "requests"),
            ("backlog_tokens", "Their tokens; for prefill, those still to be computed.", "tokens"),
            ("queue_age_seconds", "How long the first of them has waited.", "oldest_s"),
        ):
            family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name", "role"))
            for each in counts.backlogs:
                family.add_metric([self._model, each.role], getattr(each, field))
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric([self._model], value)
        return family

    def _count(
        self, name: str, text: str, value: float | dict[str, int], label: str = ""
    ) -> Metric:
        """`value`: a number, or one for each value of `label`."""
        labels = ("model_name", label) if label else ("model_name",)
        family = CounterMetricFamily(PREFIX + name, text, labels=labels)
        for own, number in value.items() if isinstance(value, dict) else [("", value)]:
            family.add_metric([self._model, *([own] if label else [])], number)
        return family
