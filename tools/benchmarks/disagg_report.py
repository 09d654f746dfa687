"""The report of `bench disagg`: tables, and sentences computed from the figures. Pure."""

import statistics
from collections.abc import Mapping, Sequence

from baton.table import table
from tools.measure.slo import Summary, Trace, percentile

LESS, MORE = -1, 1  # whether less or more is better
FIGURES = (
    ("ttft_p50", "TTFT p50, ms", LESS),
    ("ttft_p99", "TTFT p99, ms", LESS),
    ("itl_p50", "ITL p50, ms", LESS),
    ("itl_p99", "ITL p99, ms", LESS),
    ("itl_max", "ITL max, ms", LESS),
    ("goodput", "goodput, 1/s", MORE),
    ("tokens_per_s", "tokens/s", MORE),
)
EVEN = 0.05  # closer than this is a draw
HANDOVER_BAR_MS, STALL_BAR = 2.0, 5.0

Rounds = Sequence[Summary]


def median(rounds: Rounds, figure: str) -> float:
    """Over the rounds."""
    return statistics.median(float(getattr(each, figure)) for each in rounds)


def ratio(ours: Rounds, other: Rounds, figure: str) -> float:
    """Median of ours/theirs within rounds; 1 where both are zero."""
    pairs = [
        (float(getattr(a, figure)), float(getattr(b, figure)))
        for a, b in zip(ours, other, strict=True)
    ]
    return statistics.median(a / b if b else (1.0 if not a else float("inf")) for a, b in pairs)


def figures(arms: Mapping[str, Rounds]) -> str:
    """A table with a line for each arm."""
    head = ["arm", *(name for _, name, _ in FIGURES), "hand-over, ms", "KV, MB", "copied, MB"]
    lines = []
    for name, rounds in arms.items():
        line = [name, *(_number(median(rounds, figure)) for figure, _, _ in FIGURES)]
        line += [f"{median(rounds, 'handover_ms'):.2f}"]
        line += [f"{median(rounds, key) / 1e6:.1f}" for key in ("kv_bytes", "moved_bytes")]
        lines.append(line)
    return table(head, lines)


def compared(arms: Mapping[str, Rounds], ours: str) -> str:
    """Where `ours` wins and loses, figure by figure, against each other arm."""
    lines = []
    for other, rounds in arms.items():
        if other == ours:
            continue
        outcomes: dict[str, list[str]] = {"wins": [], "loses": [], "draws": []}
        for figure, name, better in FIGURES:
            times = ratio(arms[ours], rounds, figure)
            gain = times if better == MORE else 1 / times if times else float("inf")
            word = "draws" if abs(gain - 1) < EVEN else "wins" if gain > 1 else "loses"
            outcomes[word].append(f"{name.split(',')[0]} ({gain:.2f}x)")
        parts = [f"{word} {', '.join(cells)}" for word, cells in outcomes.items() if cells]
        lines.append(f"{ours} against {other}: {'; '.join(parts)}")
    return "\n".join(lines)


def idle_lines(idle: dict[str, list[Trace]], prompt: int) -> str:
    """The parts of a long prompt's TTFT on an idle cluster: queue and blocks, prefill with its messages,
    hand-over, one later decode step. The rest is the client's messages and the slower first step; in a
    colocated arm also the prefill."""
    lines = []
    for name, traces in idle.items():
        ms = [1e3 * statistics.median(parts) for parts in zip(*map(_parts, traces), strict=True)]
        copied = statistics.median(trace.timings.moved_bytes for trace in traces)
        lines.append([name, *(f"{each:.1f}" for each in ms), f"{copied / 1e6:.1f}"])
    head = [
        f"{prompt} tokens, idle",
        "TTFT, ms",
        "queue, blocks",
        "prefill",
        "hand-over",
        "a decode step",
        "the rest",
    ]
    return table([*head, "copied, MB"], lines)


def _parts(trace: Trace) -> tuple[float, ...]:
    timings, step = trace.timings, percentile(trace.gaps, 50)
    before = timings.queue_s + timings.reserve_s
    parts = (before, timings.prefill_s, timings.handover_s, step)
    return trace.ttft, *parts, trace.ttft - sum(parts)


def verdicts(
    results: Mapping[str, Mapping[str, Rounds]], ours: str, colocated: str, chunked: str
) -> list[str]:
    """The project's goals, hit or missed."""
    load, arms = next(iter(results.items()))
    stall = 1 / ratio(arms[ours], arms[colocated], "itl_p99")
    against = ratio(arms[ours], arms[chunked], "itl_p99")
    handed = median(arms[ours], "handover_ms")
    copied = median(arms[ours], "moved_bytes")
    return [
        f"{load}: p99 ITL is {stall:.1f} times better than colocated without chunking, at least "
        f"{STALL_BAR:g} wanted: {_hit(stall >= STALL_BAR)}",
        f"{load}: p99 ITL is {against:.2f} times that of chunked prefill, no more than 1 wanted: "
        f"{_hit(against <= 1)}",
        f"a hand-over takes {handed:.2f} ms, under {HANDOVER_BAR_MS:g} wanted: "
        f"{_hit(handed < HANDOVER_BAR_MS)}",
        f"{copied:,.0f} bytes were copied, 0 wanted: {_hit(copied == 0)}",
    ]


def _hit(reached: bool) -> str:
    return "hit" if reached else "MISS"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
