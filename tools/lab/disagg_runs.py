"""The clusters of the disaggregation study and the loads driven through them.

A failed run is recorded and left out. An arm that failed twice gets no further runs.

Hand-over cost is measured with real requests, one at a time, through clusters that have one transport
(`kv_transport`). Bytes and time come from one event, the writer's receipt: from the first push of a
request's blocks until all are sent and sealed. So GB/s can be compared with the memory's read speed and
must stay below it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import inf, isinf
from statistics import median

import torch

from baton.errors import BatonError
from tools.lab.disagg_findings import Handed, Round, Rounds
from tools.lab.disagg_plan import (
    CHUNK,
    PREFILL_TOKENS,
    STREAMS,
    TRANSPORTS,
    Pace,
    Plan,
    random_loads,
    streams_load,
)
from tools.lab.phrasing import number
from tools.lab.shares import Share, goodput
from tools.lab.study import Cell, Notebook
from tools.measure.limits import BUFFER, best
from tools.measure.slo import Slo, Trace, percentile, summarise
from tools.measure.split import (
    CHUNKED,
    COLOCATED,
    PD,
    Enough,
    RunningArm,
    Split,
    differences,
    options_for,
    running,
    started,
    three_splits,
)
from tools.measure.workload import Load, burst, single

STRIKES = 2
FAILURES = (BatonError, OSError)
FAR = 64  # tokens: a prompt longer than this is always filled by prefill, if there is one


@dataclass(frozen=True, slots=True)
class Idle:
    """Latencies of idle requests, in seconds."""

    ttft_s: float
    itl_s: float
    long_ttft_s: float

    @property
    def slo(self) -> Slo:
        """The limits derived from these latencies."""
        return Slo.of_idle(self.ttft_s, self.itl_s)


@dataclass(slots=True)
class Arms:
    """The clusters, all running at once; an idle one uses no CPU."""

    plan: Plan
    notebook: Notebook
    running: dict[str, RunningArm] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)

    def start(self, stack: ExitStack) -> str:
        """Start all arms. Returns what they have in common, in words. Raises BatonError if none starts
        or if they differ in more than the split."""
        plan = self.plan
        limit = max(64, STREAMS + plan.long_prompts)
        for split in three_splits(PREFILL_TOKENS, chunk=CHUNK, context=plan.context):
            self.notebook.say(f"starting {split.name}")
            try:
                self.running[split.name] = stack.enter_context(
                    started(split, model=plan.model, dtype=plan.dtype, streams=limit)
                )
            except FAILURES as error:
                self.notebook.failed(f"starting {split.name}", error)
        settings = {name: arm.setting() for name, arm in self.running.items()}
        if not settings:
            raise BatonError("no cluster could be started")
        if found := differences(settings):
            raise BatonError(f"the arms differ in more than the split: {'; '.join(found)}")
        common = next(iter(settings.values()))
        cores = ", ".join(map(str, common.cores)) or "all"
        return f"{common.computed}, {common.dtype}, cores {cores}, greedy, EOS ignored"

    def drive(
        self, name: str, load: Load, what: str, enough: Enough | None = None
    ) -> list[Trace] | None:
        """Drive the load. None if it failed: the failure is recorded."""
        arm = self.running[name]
        try:
            traces = arm.drive(load, enough=enough)
            check_path(arm.split, traces)
            return traces
        except FAILURES as error:
            self.notebook.failed(f"{name}, {what}", error)
            self.strikes[name] = self.strikes.get(name, 0) + 1
        try:
            if self.strikes[name] < STRIKES:
                arm.await_ready()
                return None
        except FAILURES as error:
            self.notebook.failed(f"{name}, after that", error)
        del self.running[name]
        return None

    @property
    def reference(self) -> str | None:
        """The arm whose capacity sets the loads: a colocated one if possible."""
        return next((each for each in (COLOCATED, CHUNKED, PD) if each in self.running), None)


def check_path(split: Split, traces: Sequence[Trace]) -> None:
    """Raises BatonError unless prompts took the path of the arm: with or without a prefill worker."""
    far = [each for each in traces if each.tokens and each.prompt_tokens > FAR]
    filled = sum(each.timings.prefill_s > 0 for each in far)
    if filled != (0 if split.colocated else len(far)):
        raise BatonError(f"{filled} of {len(far)} prompts were filled by a prefill worker")


def idle(arms: Arms) -> Idle | None:
    """Warm up every arm. Returns the latencies of the first of colocated, chunked, P/D that has any."""
    found: dict[str, Idle] = {}
    for name in list(arms.running):
        if (figures := _alone(arms, name)) is not None:
            found[name] = figures
            arms.notebook.record("idle", arm=name, **asdict(figures))
    order = (COLOCATED, CHUNKED, PD)
    return next((found[name] for name in order if name in found), None)


def _alone(arms: Arms, name: str) -> Idle | None:
    plan = arms.plan
    traces: list[Trace] = []
    for seed in (1, 2):  # the first warms up
        for load in (single(plan.prompt, plan.new_tokens, seed), single(plan.long_prompt, 4, seed)):
            its = arms.drive(name, load, "idle")
            if not its:
                return None
            traces += its
    usual, long = traces[-2:]
    return idle_of(usual, long)


def idle_of(usual: Trace, long: Trace) -> Idle:
    """The latencies of these two. ITL is the mean gap: where tokens reach a busy client in bunches, half
    of the gaps are next to nothing, and an SLO made of their median could not be met by anyone."""
    return Idle(usual.ttft, usual.tpot, long.ttft)


def capacity(arms: Arms) -> float | None:
    """Requests/s of the reference arm when all arrive at once: the second of two bursts."""
    plan, name = arms.plan, arms.reference
    found = None
    for count in (4, 12):
        load = burst(
            count, prompt=plan.prompt, new_tokens=plan.new_tokens, seed=plan.seed + count,
            context=plan.context,
        )  # fmt: skip
        traces = arms.drive(name, load, "capacity") if name in arms.running else None
        if name is None or not traces:
            return None
        found = count / max(each.tokens[-1] for each in traces)
    arms.notebook.record("capacity", arm=name, requests=count, requests_per_s=found)
    return found


def streams(
    arms: Arms, pace: Pace, slo: Slo
) -> tuple[dict[str, dict[int, Round]], dict[str, list[Trace]]]:
    """Streams beside long prompts: metrics by arm and round, and the traces of the first round."""
    numbers: dict[str, dict[int, Round]] = {name: {} for name in arms.running}
    shown: dict[str, list[Trace]] = {}
    for turn in range(arms.plan.rounds):
        load = streams_load(arms.plan, pace, turn)
        for name in list(arms.running):
            arms.notebook.say(f"{load.name}, round {turn + 1}: {name}")
            traces = arms.drive(name, load, load.name, enough=pace.enough)
            if not traces:
                continue
            if over := ended_early(traces, pace, arms.plan.stream_tokens):
                arms.notebook.failed(f"{name}, {load.name}", over)
                continue
            numbers[name][turn] = stream_numbers(traces, pace, slo)
            shown.setdefault(name, traces)
            arms.notebook.record("streams", arm=name, round=turn, **_plain(numbers[name][turn]))
            for stream in traces:
                arms.notebook.record(
                    "tokens", arm=name, round=turn, prompt_tokens=stream.prompt_tokens,
                    arrived=stream.intended, at=[round(each, 5) for each in stream.tokens],
                )  # fmt: skip
    return numbers, shown


def ended_early(traces: Sequence[Trace], pace: Pace, asked: int) -> str:
    """The reason if a stream finished before the end of the run, which spoils the run; else ""."""
    ends = [each.tokens[-1] for each in traces if each.watched and len(each.tokens) == asked]
    if min(ends, default=inf) >= pace.end:
        return ""
    return (
        f"a stream's {asked:,} tokens were done after {number(min(ends))} s of {number(pace.end)}"
    )


def stream_numbers(traces: Sequence[Trace], pace: Pace, slo: Slo) -> dict[str, float]:
    """One arm's metrics in one round. Gaps count if they end while long prompts arrive."""
    window = (pace.first, pace.end)
    found = summarise(traces, slo, window)
    watched = [each for each in traces if each.watched]
    long = [each for each in traces if not each.watched]
    counted = sum(pace.first <= at <= pace.end for each in watched for at in each.tokens)
    return {
        "itl_p50": found.itl_p50,
        "itl_p99": found.itl_p99,
        "itl_max": found.itl_max,
        "stream_tokens_per_s": counted / (pace.end - pace.first),
        "long_ttft_p50": median([1e3 * each.ttft for each in long] or [inf]),
        "requests": len(watched),
        "met": sum(map(slo.met, watched)),
        "long_requests": len(long),
        "window_s": pace.end - pace.first,
    }


def rates(
    arms: Arms, wanted: tuple[float, ...], slo: Slo
) -> dict[float, dict[str, dict[int, Round]]]:
    """Requests at random: metrics by rate, arm and round."""
    found: dict[float, dict[str, dict[int, Round]]] = {}
    for rate, turn, load in random_loads(arms.plan, wanted):
        its = found.setdefault(rate, {name: {} for name in arms.running})
        if not load.requests:
            arms.notebook.failed(f"{load.name}, round {turn + 1}", "no request arrived in time")
            continue
        for name in list(arms.running):
            arms.notebook.say(f"{load.name}, round {turn + 1}: {name}")
            traces = arms.drive(name, load, load.name)
            if not traces:
                continue
            its[name][turn] = rate_numbers(traces, slo, rate, arms.plan.window_s(rate))
            arms.notebook.record(
                "rate", arm=name, rate=rate, round=turn, load=load.digest,
                **_plain(its[name][turn]),
                ttft_ms=[round(1e3 * each.ttft, 3) for each in traces],
            )  # fmt: skip
    return found


def rate_numbers(
    traces: Sequence[Trace], slo: Slo, rate: float, window_s: float
) -> dict[str, float]:
    """One arm's metrics in one round of requests at random, all of which arrived within `window_s`."""
    within = Share(sum(map(slo.met, traces)), len(traces))
    return asdict(summarise(traces, slo, (0.0, inf))) | {
        "tpot_p50": 1e3 * percentile([each.tpot for each in traces], 50),
        "goodput": goodput(within, rate),
        "requests": within.of,
        "met": within.good,
        "window_s": window_s,
    }


def measured(results: Mapping[str, Rounds]) -> bool:
    """Whether any arm has a result."""
    return any(results.values())


def _plain(numbers: Mapping[str, float]) -> dict[str, Cell]:
    """Infinity as None: JSON has no infinity."""
    return {key: None if isinf(value) else value for key, value in numbers.items()}


NEW_TOKENS = 2


def measure_handover(plan: Plan, notebook: Notebook) -> list[Handed]:
    """Measure every transport at every length, several times."""
    lengths = []
    for length in plan.lengths:
        if 2 <= length <= plan.context - NEW_TOKENS:
            lengths.append(length)
        else:
            why = f"{plan.model} takes prompts of 2 to {plan.context - NEW_TOKENS} tokens here"
            notebook.failed(f"hand-over of {length} tokens", why)
    found: list[Handed] = []
    for transport in TRANSPORTS if lengths else ():
        notebook.say(f"hand-over by {transport}")
        try:
            for handed in _by(transport, lengths, plan):
                notebook.record("handover", **asdict(handed))
                found.append(handed)
        except (BatonError, OSError) as error:
            notebook.failed(f"hand-over by {transport}", error)
    return found


def _by(transport: str, lengths: Sequence[int], plan: Plan) -> Iterator[Handed]:
    split = Split(transport, False, PREFILL_TOKENS)
    options = options_for(split, model=plan.model, dtype=plan.dtype, streams=4)
    with running(split, replace(options, kv_transport=transport)) as arm:
        arm.drive(single(lengths[0], NEW_TOKENS, plan.seed))  # warms up
        for length in lengths:
            for turn in range(plan.repeats):
                (trace,) = arm.drive(single(length, NEW_TOKENS, 100 * plan.seed + turn))
                yield _handed(transport, trace)


def _handed(transport: str, trace: Trace) -> Handed:
    timings = trace.timings
    if not timings.prefill_s:
        raise BatonError(
            f"a prompt of {trace.prompt_tokens} tokens was not filled by a prefill worker"
        )
    return Handed(
        transport,
        trace.prompt_tokens,
        timings.kv_bytes,
        timings.moved_bytes,
        1e3 * timings.handover_s,
        1e3 * trace.ttft,
        1e3 * timings.prefill_s,
    )


def memory_read_gb_s() -> float:
    """Read speed of the memory with all of torch's threads, as in measure/limits.py."""
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64)
    return BUFFER / best(buffer.sum) / 1e9
