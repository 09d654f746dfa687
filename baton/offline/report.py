"""Report: a job's timings as tables, and a sentence that names the stage that bounds it.

The timings of a request are those that the router measured. Requests overlap, so sums over requests
exceed the wall time; a stage was busy for the length of the union of its intervals, which follow each
other from a request's submission in the order queue, prefill, hand-over, decode.

Inter-token latency (ITL) is measured at the client: the gap between two messages with tokens of one
request. A message with n tokens counts once with its gap and n-1 times with 0, as they arrive together.
The time to the first token (TTFT) is not a gap. Percentiles are nearest-rank.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from baton.client.batch import Completion
from baton.table import amount, percentile, seconds, table
from baton.timing import Stages

STAGES = ("queue", "prefill", "hand-over", "decode")
QUEUE_MATTERS = 0.3  # share of a request's time in the queue from which the report mentions it


@dataclass(slots=True)
class Tally:
    """The timings of the completed requests, without their texts."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    retries: int = 0
    preemptions: int = 0
    kv_bytes: int = 0
    moved_bytes: int = 0
    cached_tokens: int = 0
    first: float = float("inf")  # the first submission, on the client's clock
    last: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    ttft: list[float] = field(default_factory=list)
    queues: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    intervals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, done: Completion) -> None:
        """Add a request."""
        times = done.timings
        self.requests += 1
        self.prompt_tokens += done.prompt_tokens
        self.output_tokens += len(done.token_ids)
        self.retries += times.retries
        self.preemptions += times.preemptions
        self.kv_bytes += times.kv_bytes
        self.moved_bytes += times.moved_bytes
        self.cached_tokens += times.cached_tokens
        self.first = min(self.first, done.submitted)
        self.last = max(self.last, done.ended)
        self.ttft.append(times.ttft_s)
        self.queues.append(times.queue_s + times.reserve_s)
        self.totals.append(times.total_s)
        self.gaps.extend(after - before for before, after in pairwise(done.arrivals))
        stages = (
            ("queue", times.queue_s + times.reserve_s),
            ("prefill", times.prefill_s),
            ("hand-over", times.handover_s),
            ("decode", times.decode_s),
        )
        at = done.submitted + done.tokenize_s
        for name, spent in stages:
            self.intervals.setdefault(name, []).append((at, at + spent))
            at += spent
        apart = (("tokenize", done.tokenize_s), ("detokenize", times.detokenize_s))
        for name, spent in (*stages, *apart):
            self.sums[name] = self.sums.get(name, 0.0) + spent

    @property
    def wall_s(self) -> float:
        """From the first submission to the last end."""
        return max(self.last - self.first, 1e-9) if self.requests else 0.0

    def busy_s(self, stage: str) -> float:
        """How long at least one request was in this stage, in seconds."""
        return union(self.intervals.get(stage, []))


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """The total length of the union of the intervals."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def report(tally: Tally, *, load_s: float) -> str:
    """The whole report."""
    if not tally.requests:
        return "nothing was generated in this run, so there is nothing to measure"
    parts = [
        stage_table(tally, load_s=load_s),
        request_table(tally),
        throughput(tally),
        verdict(tally),
    ]
    return "\n\n".join(parts)


def stage_table(tally: Tally, *, load_s: float) -> str:
    """Stage times. `busy`: the part of the job's wall time in which some request was in the stage."""
    rows = [["load", seconds(load_s), "", ""]]
    for name in ("tokenize", *STAGES, "detokenize"):
        total = tally.sums.get(name, 0.0)
        busy = f"{tally.busy_s(name) / tally.wall_s:.0%}" if name in STAGES else ""
        rows.append([name, seconds(total), seconds(total / tally.requests), busy])
    return table(["stage", "sum over requests", "mean", "busy"], rows)


def request_table(tally: Tally) -> str:
    """Per-request times; queue and execution add up to the total."""
    pairs = zip(tally.totals, tally.queues, strict=True)
    rows = [
        _spread("queue", tally.queues),
        _spread("execution", [total - queue for total, queue in pairs]),
        _spread("total", tally.totals),
        _spread("TTFT, queue included", tally.ttft),
    ]
    if tally.gaps:
        rows.append(_spread("ITL", list(tally.gaps)))
    return table(["per request", "mean", "p50", "p99", "max"], rows)


def throughput(tally: Tally) -> str:
    """Tokens per second, KV bytes handed over, cache hits and preemptions."""
    wall = tally.wall_s
    lines = [
        f"{tally.requests:,} requests in {seconds(wall)}: {tally.prompt_tokens:,} prompt tokens "
        f"({tally.prompt_tokens / wall:,.0f}/s), {tally.output_tokens:,} output tokens "
        f"({tally.output_tokens / wall:,.0f}/s), {tally.retries} retries",
        handed_over(tally),
    ]
    if tally.cached_tokens:
        share = tally.cached_tokens / tally.prompt_tokens
        lines.append(
            f"prefix cache: the KV of {tally.cached_tokens:,} prompt tokens ({share:.0%}) was "
            "already cached"
        )
    if tally.preemptions:
        lines.append(
            f"KV pool: full {tally.preemptions:,} times, and the youngest request began again; "
            "--kv-cache-memory-bytes makes it larger"
        )
    return "\n".join(lines)


def handed_over(tally: Tally) -> str:
    """How many KV bytes went from prefill to decode, and how."""
    if not tally.intervals.get("prefill") or not tally.sums.get("prefill"):
        return "KV: nothing handed over, decode filled its own cache"
    if not tally.moved_bytes:
        return f"KV: {amount(tally.kv_bytes)} handed over in place, 0 bytes copied"
    spent = tally.sums.get("hand-over", 0.0)
    speed = f" at {tally.moved_bytes / spent / 1e9:.2f} GB/s" if spent else ""
    return (
        f"KV: {amount(tally.kv_bytes)} handed over, {amount(tally.moved_bytes)} "
        f"copied in whole blocks{speed}"
    )


def verdict(tally: Tally) -> str:
    """The stage that bounds the job: the one that was busy for most of the wall time."""
    busy = {name: tally.busy_s(name) for name in ("prefill", "hand-over", "decode")}
    name = max(busy, key=lambda each: busy[each])
    second = sorted(busy, key=lambda each: busy[each])[-2]
    sentence = (
        f"{name} bounds this job: it was busy for {busy[name] / tally.wall_s:.0%} of the "
        f"{seconds(tally.wall_s)}, {second} for {busy[second] / tally.wall_s:.0%}"
    )
    waited = sum(tally.queues) / max(sum(tally.totals), 1e-9)
    if waited < QUEUE_MATTERS:
        return f"{sentence}."
    way_out = ""
    if tally.preemptions:  # requests wait for blocks, not for a slot of the batch
        way_out = ": the KV pool is too small for so many at once"
    elif name == "decode":
        way_out = ": a larger -b lets more of them share each step"
    return f"{sentence}; requests waited {waited:.0%} of their time in the queue{way_out}."


def startup_line(stages: Stages) -> str:
    """From the start of `python main.py` to the first token, and where it went."""
    parts = ", ".join(f"{name} {seconds(value)}" for name, value in stages.times.items())
    return f"first token after {seconds(sum(stages.times.values()))}: {parts}"


def _spread(name: str, values: list[float]) -> list[str]:
    ranked = sorted(values)
    mean = sum(ranked) / len(ranked)
    shown = (mean, percentile(ranked, 50), percentile(ranked, 99), ranked[-1])
    return [name, *map(seconds, shown)]
