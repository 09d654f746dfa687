"""Metrics for Prometheus at /metrics: vLLM's names under our prefix, plus those of the KV hand-over.

    FirstToken, Ended      of every request, whichever client sent it: observed at once, see started()
    Counts                 the router's and the workers' totals, as last received, see totals.py
    asked(), answered()    requests of this server's clients

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections import Counter as Counted
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate, zip_longest

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from baton.server.admission import Admission
from baton.server.totals import Totals
from baton.timeline import short_name
from baton.wire.messages import ClusterInfo
from baton.wire.records import (
    FORWARD_TOKENS,
    ITL_BUCKETS_S,
    Counts,
    Ended,
    FirstToken,
    Timings,
    Work,
)

PREFIX = "baton:"
GOOD = ("stop", "length")
UNSOUND = "numerical_error"
FAILURES = ("abort", "worker_lost", UNSOUND, "queue_timeout", "deadline_exceeded")
REJECTIONS = ("overloaded", "not_ready", "rate_limit_exceeded")
"""Series that begin at 0: else a rate does not see the first of its kind. Others begin when they come."""
LATENCIES_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
HANDOVERS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHOICES = (1, 2, 5, 10, 20)
REMEMBERED = 50_000
"""Requests that have a token and have not ended; more than a cluster has at once."""

AT_FIRST_TOKEN = {  # name: help, the field of Timings
    "time_to_first_token_seconds": ("From submission to the first token.", "ttft_s"),
    "request_queue_time_seconds": ("Waiting for room, or for a batch to fill.", "queue_s"),
    "request_prefill_time_seconds": ("Prefill, hand-over apart.", "prefill_s"),
}
AT_END = {
    "e2e_request_latency_seconds": ("From submission to the end.", "total_s"),
    "request_decode_time_seconds": ("Decode, from Start to the end.", "decode_s"),
}

AT_EMBEDDING = {
    name: field
    for name, field in (AT_FIRST_TOKEN | AT_END).items()
    if field[1] in ("queue_s", "prefill_s", "total_s")
}


class Metrics:
    """One model's metrics. As a collector of its own registry it exports the router's counts."""

    def __init__(self, model: str, prefix: str = PREFIX) -> None:
        self.registry = CollectorRegistry()
        self._model = model.encode("utf-8", "replace").decode()
        self.prefix = prefix
        self._totals = Totals()
        self._counts: Counts | None = None
        self._first: OrderedDict[str, Timings] = OrderedDict()  # by request
        self.info: ClusterInfo | None = None
        self._router = ""
        self._dtype = ""  # of the last info
        self._roles: set[str] = set()  # of all workers there were
        self.router_restarts = 0
        self.admission: Admission | None = None
        self._rejections = self._counter("admission_rejections", "Rejected for now.", "reason")
        self._times = {
            name: self._histogram(name, text, LATENCIES_S)
            for name, (text, _) in (AT_FIRST_TOKEN | AT_END).items()
        }
        self._inference = self._histogram(
            "request_inference_time_seconds", "All but the queue.", LATENCIES_S
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Decode time by tokens.", LATENCIES_S
        )
        self._handover = self._histogram("kv_transfer_seconds", "Hand-over.", HANDOVERS_S)
        self._prompt_lengths = self._histogram("request_prompt_tokens", "Prompt tokens.", TOKENS)
        self._computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.", TOKENS
        )
        self._answer_lengths = self._histogram(
            "request_generation_tokens", "Generated tokens.", TOKENS
        )
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest choice.", TOKENS
        )
        self._n = self._histogram("request_params_n", "Choices for each prompt.", CHOICES)
        self._most = self._histogram(
            "request_params_max_tokens", "Tokens that a choice may have.", TOKENS
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self._cached = self._counter("prefix_cache_hits", "Prompt tokens whose KV was cached.")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._reused = self._counter(
            "prefill_prefix_cache_hits", "Of those, tokens whose KV was there: not computed."
        )
        self._filled = self._counter(
            "prefill_prefix_cache_queries", "Tokens of prompts that prefill workers filled."
        )
        self._success = self._counter("request_success", "Succeeded.", "finished_reason")
        self._failed = self._counter("request_failure", "Failed.", "reason")
        known = (self._success, GOOD), (self._failed, FAILURES), (self._rejections, REJECTIONS)
        for counter, reasons in known:
            for reason in reasons:
                counter.labels(self._model, reason)
        self._corrupted = self._counter("corrupted_requests", "Failed: logits were not finite.")
        self._bytes = self._counter("kv_transfer_bytes", "KV bytes copied.", "transport")
        self._retries = self._counter("request_retries", "Runs restarted after a loss.")
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        names = ("model_name", *labels)
        counter = Counter(self.prefix + name, text, names, registry=self.registry)
        if not labels:
            counter.labels(self._model)
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            self.prefix + name, text, ("model_name",), registry=self.registry, buckets=buckets
        )
        histogram.labels(self._model)
        return histogram

    # ---- what happens

    def rejected(self, reason: str) -> None:
        """A request was answered with 429 or 503."""
        self._rejections.labels(self._model, reason).inc()

    def asked(self, n: int, max_tokens: Sequence[int]) -> None:
        """A client's request is accepted: `n` choices for each prompt, of at most so many tokens."""
        self._n.labels(self._model).observe(n)
        most = self._most.labels(self._model)
        for each in max_tokens:
            most.observe(each)

    def answered(self, tokens: int) -> None:
        """A client's request is over; its longest choice has so many tokens."""
        self._longest.labels(self._model).observe(tokens)

    def at_router(self, router: str, live: Collection[str]) -> None:
        """To be called before its events: with another router, only the requests that are `live`, those
        of this server, go on. The ends of all others are not told any more."""
        if router != self._router:
            for request in self._first.keys() - live:
                del self._first[request]
        self._router = router

    def started(self, first: FirstToken) -> bool:
        """A request has its first token. After the loss of a router it has one more, and what it took
        since; only the KV that was moved for it counts again. Returns whether it is its first."""
        timings, new = first.timings, first.request not in self._first
        if new:
            self._read(first.prompt_tokens, timings, first.transport)
            self._began(AT_FIRST_TOKEN, first.prompt_tokens, timings)
        self._moved(first.transport, timings, None)
        self._first[first.request] = timings
        if len(self._first) > REMEMBERED:
            self._first.popitem(last=False)
        return new

    def ended_alone(self, request: str, reason: str) -> None:
        """A request has ended while no router answered: its times are not known."""
        self._first.pop(request, None)
        (self._success if reason in GOOD else self._failed).labels(self._model, reason).inc()

    def replaced(self, ended: Ended) -> None:
        """An attempt has ended in whose place there is another: the request goes on."""
        first = self._first.get(ended.request)
        self._moved(ended.transport, ended.timings, first)
        if first is not None:
            self._first[ended.request] = ended.timings

    def ended(self, ended: Ended) -> None:
        """A request has ended. What is known since its first token was observed then, unless this server
        has not seen it."""
        model, timings = self._model, ended.timings
        good = ended.reason in GOOD
        (self._success if good else self._failed).labels(model, ended.reason).inc()
        self._corrupted.labels(model).inc(ended.reason == UNSOUND)
        first = self._first.pop(ended.request, None)
        self._moved(ended.transport, timings, first)
        if ended.embedding:
            self._embedded(ended, good=good)
            return
        if first is None:
            self._read(ended.prompt_tokens, timings, ended.transport)
        if not good:
            return
        if first is None:
            self._began(AT_FIRST_TOKEN, ended.prompt_tokens, timings)
        self._observe(AT_END, timings)
        self._inference.labels(model).observe(max(0.0, timings.total_s - timings.queue_s))
        self._prompt_lengths.labels(model).observe(ended.prompt_tokens)
        self._answer_lengths.labels(model).observe(ended.tokens)
        if ended.tokens > 1:
            spent = (timings.total_s - timings.ttft_s) / (ended.tokens - 1)
            self._per_token.labels(model).observe(max(0.0, spent))

    def counted(self, counts: Counts) -> Counts:
        """The router's counts of now. Returns them with totals since this server's start."""
        self._counts = self._totals.add(counts)
        return self._counts

    def _embedded(self, ended: Ended, *, good: bool) -> None:
        """It has no first token and no answer, and looks up no prefix."""
        self._prompt.labels(self._model).inc(ended.prompt_tokens)
        if good:
            self._began(AT_EMBEDDING, ended.prompt_tokens, ended.timings)
            self._prompt_lengths.labels(self._model).observe(ended.prompt_tokens)

    def _read(self, prompt_tokens: int, timings: Timings, transport: str) -> None:
        self._prompt.labels(self._model).inc(prompt_tokens)
        self._queried.labels(self._model).inc(prompt_tokens)
        self._cached.labels(self._model).inc(timings.cached_tokens)
        if transport:  # of a hand-over
            self._filled.labels(self._model).inc(prompt_tokens)
            self._reused.labels(self._model).inc(timings.prefill_reused_tokens)

    def _began(
        self, which: Mapping[str, tuple[str, str]], prompt_tokens: int, timings: Timings
    ) -> None:
        """The prompt is computed."""
        self._observe(which, timings)
        computed = max(0, prompt_tokens - timings.cached_tokens)
        self._computed.labels(self._model).observe(computed)

    def _observe(self, which: Mapping[str, tuple[str, str]], timings: Timings) -> None:
        for name, (_, field) in which.items():
            self._times[name].labels(self._model).observe(getattr(timings, field))

    def _moved(self, transport: str, timings: Timings, before: Timings | None) -> None:
        """Runs and hand-overs since `before`, if it was observed. They may be fewer: another router may
        have begun the request anew."""
        retries, spent_s, moved = timings.retries, timings.handover_s, timings.moved_bytes
        if before is not None:
            retries, spent_s = retries - before.retries, spent_s - before.handover_s
            moved -= before.moved_bytes
        self._retries.labels(self._model).inc(max(0, retries))
        if transport and (before is None or spent_s > 0):
            self._handover.labels(self._model).observe(spent_s)
            self._bytes.labels(self._model, transport).inc(max(0, moved))

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    # ---- the router's counts, as last received

    def describe(self) -> list[Metric]:
        """Empty, because the names are known only with the first counts."""
        return []

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield from self._workers()
        yield self._gauge("router_up", "1: the router answers.", self.info is not None)
        yield self._count("router_losses", "Routers lost.", self.router_restarts)
        if self.admission is not None:
            in_lines = self.admission.in_lines
            yield self._gauge("num_requests_in_lines", "Behind others of one request.", in_lines)
            waiting = self.admission.waiting
            yield self._gauge("num_requests_admitted", "Here, without a token yet.", waiting)
        if self._counts is not None:
            yield from self._counted(self._counts)
            yield from self._work()

    def _workers(self) -> Iterator[Metric]:
        """By role and name. While a process is replaced, its successor has the same name. Also by role,
        so that the end of the last one of a role is seen."""
        labels = ("model_name", "role", "worker")
        up = self._family("worker_up", "1: gets work.", labels)
        load = self._family("worker_load_seconds", "From its start until it could join.", labels)
        found: dict[tuple[str, str], tuple[bool, float]] = {}
        workers, shared = self.info.workers if self.info else (), self._shared()
        for each in workers:
            key = each.role, _label(each.role, each.worker, shared)
            alive = each.state == "alive"
            if alive or key not in found:
                found[key] = alive, each.load_s
        for key, (alive, load_s) in found.items():
            up.add_metric([self._model, *key], alive)
            load.add_metric([self._model, *key], load_s)
        number = self._family("num_workers", "Workers that get work.", ("model_name", "role"))
        self._roles.update(each.role for each in workers)
        for role in sorted(self._roles):
            alive_here = sum(each.role == role and each.state == "alive" for each in workers)
            number.add_metric([self._model, role], alive_here)
        yield from (up, load, number)

    def _shared(self) -> set[tuple[str, str]]:
        """Roles and short names of which several workers are alive: no successors, but workers that were
        started with one name. Only their full names tell them apart."""
        workers = self.info.workers if self.info else ()
        alive = [(w.role, short_name(w.worker)) for w in workers if w.state == "alive"]
        return {key for key, number in Counted(alive).items() if number > 1}

    def _counted(self, counts: Counts) -> Iterator[Metric]:
        pools = counts.pools
        used = sum(pool.blocks - pool.free for pool in pools)
        total = sum(pool.blocks for pool in pools)
        cached = sum(pool.cached for pool in pools)
        quarantined = sum(pool.quarantined for pool in pools)
        yield self._gauge("num_requests_running", "On a worker.", counts.running)
        yield self._gauge("num_requests_waiting", "Without a decode step yet.", counts.waiting)
        yield self._gauge(
            "num_requests_without_token", "On a worker, without a token yet.", counts.tokenless
        )
        yield self._gauge("kv_cache_usage_perc", "Blocks held, of all.", used / max(total, 1))
        yield self._gauge("kv_blocks_leased", "Blocks held by requests.", used)
        yield self._gauge("kv_blocks", "Blocks of all pools.", total)
        yield self._gauge("kv_blocks_cached", "Free blocks that may be used again.", cached)
        yield self._gauge("kv_blocks_quarantined", "Blocks a writer may still reach.", quarantined)
        yield self._cache_config(counts)
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
        yield self._decided(counts)
        lost = {"prefill": counts.lost_prefill, "decode": counts.lost_decode}
        yield self._count("workers_lost", "Workers that died or were given up.", lost, "role")
        name, text = self.prefix + "inter_token_latency_seconds", "Between tokens."
        itl = HistogramMetricFamily(name, text, labels=("model_name",))
        itl.add_metric([self._model], _buckets(ITL_BUCKETS_S, counts.itl), counts.itl_s)
        yield itl

    def _decided(self, counts: Counts) -> Metric:
        """By role and reason."""
        name, text = self.prefix + "prompts_filled", "Who was told to fill a prompt, and why."
        family = CounterMetricFamily(name, text, labels=("model_name", "role", "reason"))
        for each in counts.decided:
            family.add_metric([self._model, each.role, each.cause], each.requests)
        return family

    def _cache_config(self, counts: Counts) -> Metric:
        """vLLM's name and labels, one series for each pool."""
        labels = ("model_name", "worker", "block_size", "num_gpu_blocks", "cache_dtype")
        family = self._family("cache_config_info", "1; the labels describe a KV pool.", labels)
        self._dtype = self.info.kv_dtype if self.info else self._dtype
        shared = self._shared()
        pools = {_label("decode", pool.worker, shared): pool for pool in counts.pools}
        for name, pool in pools.items():
            sizes = str(pool.block_size), str(pool.blocks)
            family.add_metric([self._model, name, *sizes, self._dtype], 1)
        return family

    def _backlogs(self, counts: Counts) -> Iterator[Metric]:
        """What waits for each role: what an autoscaler acts on."""
        for name, text, field in (
            ("backlog_requests", "Requests that wait for a worker of the role.", "requests"),
            ("backlog_tokens", "Their tokens; for prefill, those still to be computed.", "tokens"),
            ("queue_age_seconds", "How long the first of them has waited.", "oldest_s"),
        ):
            family = self._family(name, text, ("model_name", "role"))
            for each in counts.backlogs:
                family.add_metric([self._model, each.role], getattr(each, field))
            yield family

    def _work(self) -> Iterator[Metric]:
        """What the workers have computed."""
        name, text = self.prefix + "iteration_tokens_total", "Tokens of one forward."
        forwards = HistogramMetricFamily(name, text, labels=("model_name", "role"))
        for role in sorted({*self._totals.roles, *(self._roles & {"prefill", "decode"})}):
            work = self._totals.work(role)
            buckets = _buckets(FORWARD_TOKENS, work.forwards)
            forwards.add_metric([self._model, role], buckets, work.tokens)
        yield forwards
        yield from self._drafts(self._totals.work("decode"))

    def _drafts(self, work: Work) -> Iterator[Metric]:
        accepted, name = sum(work.accepted), "spec_decode_num_accepted_tokens"
        by_place = {str(place): number for place, number in enumerate(work.accepted)}
        yield self._count("spec_decode_num_drafts", "Drafts.", work.drafts)
        yield self._count("spec_decode_num_draft_tokens", "Tokens of them.", work.draft_tokens)
        yield self._count(name, "Those that were accepted.", accepted)
        yield self._count(f"{name}_per_pos", "By place in the draft.", by_place, "position")

    def _family(self, name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
        return GaugeMetricFamily(self.prefix + name, text, labels=labels)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._family(name, text, ("model_name",))
        family.add_metric([self._model], value)
        return family

    def _count(
        self, name: str, text: str, value: float | dict[str, int], label: str = ""
    ) -> Metric:
        """`value`: a number, or one for each value of `label`."""
        labels = ("model_name", label) if label else ("model_name",)
        family = CounterMetricFamily(self.prefix + name, text, labels=labels)
        for own, number in value.items() if isinstance(value, dict) else [("", value)]:
            family.add_metric([self._model, *([own] if label else [])], number)
        return family


def _label(role: str, worker: str, shared: Collection[tuple[str, str]]) -> str:
    """The short name, so that a successor continues the series; the full one where it is `shared`."""
    short = short_name(worker)
    return worker if (role, short) in shared else short


def _buckets(ends: Sequence[float], numbers: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them, up to +Inf. What lies behind it is not read."""
    names = (*map(str, ends), "+Inf")
    found = zip_longest(names, numbers[: len(names)], fillvalue=0)
    return list(zip(names, accumulate(number for _, number in found), strict=True))
