"""Findings of the disaggregation study, computed from its numbers. Pure.

A cell is one metric under one load: P/D beside the best colocated arm.

    wins            P/D is better in every round, and the median by EVEN at least
    loses           P/D is worse in every round, and the median by as much
    no difference   anything else: rounds that disagree, or a difference too small to matter
    not comparable  the median gap is below TOGETHER_MS: tokens reached a busy client together, so the
                    gap says how they arrived, not how long a reader waited

A hand-over moves one request's KV to the decode worker. Its bytes and time are the writer's receipt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from tools.lab.phrasing import listed, number, spread, times
from tools.lab.study import Table
from tools.measure.split import PD

WINS, LOSES, EVEN_CELL, UNCLEAR = "wins", "loses", "no difference", "not comparable"
TOGETHER_MS = 0.1
EVEN = 0.05
LESS, MORE = -1, 1  # whether less or more is better
STREAM_METRICS = (
    ("itl_p50", "ITL p50", "ms", LESS),
    ("itl_p99", "ITL p99", "ms", LESS),
    ("itl_max", "ITL max", "ms", LESS),
    ("stream_tokens_per_s", "tokens/s of the streams", "", MORE),
    ("long_ttft_p50", "TTFT p50 of the long prompts", "ms", LESS),
)
RATE_METRICS = (
    ("ttft_p50", "TTFT p50", "ms", LESS),
    ("ttft_p99", "TTFT p99", "ms", LESS),
    ("itl_p50", "ITL p50", "ms", LESS),
    ("itl_p99", "ITL p99", "ms", LESS),
    ("tpot_p50", "TPOT p50", "ms", LESS),
    ("goodput", "goodput", "1/s", MORE),
)

Metric = tuple[str, str, str, int]
Round = Mapping[str, float]  # one arm's numbers in one round, by metric
Rounds = Mapping[int, Round]  # by number; failed rounds are missing


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric under one load. `ratios`: P/D over the best colocated arm, round by round."""

    load: str
    metric: str
    unit: str
    better: int
    ours: float
    others: Mapping[str, float]
    best: str  # of the others
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median."""
        return median(self.ratios)

    @property
    def verdict(self) -> str:
        """The verdict, by the rule above."""
        if self.unit == "ms" and min(self.ours, self.others[self.best]) < TOGETHER_MS:
            return UNCLEAR
        gains = [_gain(each, self.better) for each in self.ratios]
        middle = median(gains)
        if min(gains) > 1 and middle >= 1 + EVEN:
            return WINS
        if max(gains) < 1 and middle <= 1 / (1 + EVEN):
            return LOSES
        return EVEN_CELL


def cells_of(load: str, arms: Mapping[str, Rounds], metrics: Sequence[Metric]) -> list[Cell]:
    """The cells of one load; empty without P/D or without a colocated arm. The best colocated arm has the
    best median over the rounds it shares with P/D."""
    found = []
    for key, name, unit, better in metrics:
        ours = arms.get(PD, {})
        pairs = {
            other: [(ours[n][key], rounds[n][key]) for n in sorted(ours.keys() & rounds.keys())]
            for other, rounds in arms.items()
            if other != PD
        }
        medians = {
            other: median(theirs for _, theirs in each) for other, each in pairs.items() if each
        }
        if not medians:
            continue
        best = (max if better == MORE else min)(medians, key=lambda other: medians[other])
        mine = median(each for each, _ in pairs[best])
        ratios = tuple(_ratio(a, b) for a, b in pairs[best])
        found.append(Cell(load, name, unit, better, mine, medians, best, ratios))
    return found


def cell_table(cells: Sequence[Cell], arms: Sequence[str]) -> Table:
    """A row for each cell, losses and wins alike."""
    others = [arm for arm in arms if arm != PD]
    rows = [
        (
            f"{cell.load}: {cell.metric}" + (f", {cell.unit}" if cell.unit else ""),
            number(cell.ours),
            *(number(cell.others[arm]) if arm in cell.others else "-" for arm in others),
            spread(cell.ratios),
            f"P/D {cell.verdict}" if cell.verdict in (WINS, LOSES) else cell.verdict,
        )
        for cell in cells
    ]
    title = "P/D against the best colocated arm, cell by cell"
    return Table(
        title, ("load: metric", PD, *others, "P/D : best colocated", "verdict"), tuple(rows)
    )


def conclusion(cells: Sequence[Cell]) -> list[str]:
    """For which of the measured traffic the split pays on this machine."""
    if not cells:
        return ["P/D was not measured beside a colocated cluster: no conclusion."]
    kinds = (WINS, LOSES, EVEN_CELL, UNCLEAR)
    count = {kind: sum(cell.verdict == kind for cell in cells) for kind in kinds}
    rounds = max(len(cell.ratios) for cell in cells)
    agree = "the one round agrees" if rounds == 1 else "all rounds agree"
    return [
        *(_of_load(load, its) for load, its in _grouped(cells, "load").items()),
        f"Of {len(cells)} cells P/D wins {count[WINS]} and loses {count[LOSES]}; no difference: "
        f"{count[EVEN_CELL]}; not comparable, as tokens reached the client together: "
        f"{count[UNCLEAR]}. A cell counts if {agree} and the median is off by {EVEN:.0%} or more; "
        "P/D is always compared with the better colocated arm.",
        _pays(cells),
    ]


def _of_load(load: str, cells: Sequence[Cell]) -> str:
    sentences = []
    for verdict in (WINS, LOSES):
        hits = [f"{c.metric} ({times(c.ratio)} times)" for c in cells if c.verdict == verdict]
        sentences.append(f"{verdict} {', '.join(hits)}" if hits else f"{verdict} nothing")
    return f"{load}: P/D {'; '.join(sentences)}."


def _pays(cells: Sequence[Cell]) -> str:
    """A metric with wins and no losses pays; one with losses and no wins costs."""
    pays, costs, both = [], [], []
    for metric, its in _grouped(cells, "metric").items():
        found = {cell.verdict for cell in its}
        if {WINS, LOSES} <= found:
            both.append(metric)
        elif WINS in found:
            pays.append(metric)
        elif LOSES in found:
            costs.append(metric)
    sentences = [
        f"it pays for traffic that is judged by {listed(pays)}" if pays else "",
        f"it costs traffic that is judged by {listed(costs)}" if costs else "",
        f"it depends on the load for {listed(both)}" if both else "",
    ]
    if not any(sentences):
        return "So on this machine the split makes no measured difference."
    if not pays and not both:
        sentences[0] = "no measured traffic gains from the split"
    return f"So on this machine {'; '.join(each for each in sentences if each)}."


def _grouped(cells: Sequence[Cell], key: str) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(getattr(cell, key), []).append(cell)
    return groups


def goodput_sentence(cells: Sequence[Cell], slo: str) -> str:
    """Which arm serves more requests within the SLO, rate by rate."""
    its = [cell for cell in cells if cell.metric == "goodput"]
    if not its:
        return f"Goodput ({slo}) was not measured for P/D and a colocated arm."
    parts = [
        f"{number(cell.ours)}/s against {number(cell.others[cell.best])} at {cell.load} "
        f"({cell.verdict})"
        for cell in its
    ]
    return f"Requests within the SLO ({slo}), P/D against the better colocated arm: {', '.join(parts)}."


def interference_sentence(arms: Mapping[str, Rounds], load: str) -> str:
    """How long the streams' tokens wait while long prompts arrive."""
    parts = [
        f"{number(median(each['itl_max'] for each in rounds.values()))} ms with {arm} "
        f"(p99 {number(median(each['itl_p99'] for each in rounds.values()))})"
        for arm, rounds in arms.items()
        if rounds
    ]
    if not parts:
        return f"The wait of streams beside long prompts was not measured ({load})."
    return (
        f"The longest wait between two tokens ({load}): {', '.join(parts)}; medians of the rounds."
    )


def _ratio(ours: float, theirs: float) -> float:
    if ours == theirs:  # both zero or both infinite
        return 1.0
    return ours / theirs if theirs else inf


def _gain(ratio: float, better: int) -> float:
    if better == MORE:
        return ratio
    return 1 / ratio if ratio else inf


WAYS = {
    "shm": "shared memory, in place",
    "pinned": "pinned pages (CPU form)",
    "frames": "frames over ipc",
}


@dataclass(frozen=True, slots=True)
class Handed:
    """One request's hand-over."""

    transport: str
    prompt: int  # tokens
    kv_bytes: int
    moved_bytes: int
    ms: float
    ttft_ms: float
    prefill_ms: float

    @property
    def gb_per_s(self) -> float | None:
        """None if no bytes were copied."""
        return self.moved_bytes / self.ms / 1e6 if self.moved_bytes and self.ms else None


def too_fast(handed: Sequence[Handed], read_gb_s: float) -> list[str]:
    """A sentence for each hand-over that reports more GB/s than the memory reads, which cannot be
    right."""
    return [
        f"{each.transport} reports {each.gb_per_s:.1f} GB/s for {each.prompt} tokens, more than the "
        f"{read_gb_s:.1f} of this machine's memory: its bytes or its time are wrong"
        for each in handed
        if each.gb_per_s is not None and each.gb_per_s > read_gb_s
    ]


def handover_table(handed: Sequence[Handed]) -> Table:
    """Medians, a line for each transport and length."""
    rows = []
    for (transport, prompt), its in grouped(handed).items():
        speeds = [each.gb_per_s for each in its if each.gb_per_s is not None]
        rows.append(
            (
                f"{WAYS[transport]}, {prompt:,} tokens",
                f"{its[0].kv_bytes / 1e6:.2f}",
                f"{its[0].moved_bytes / 1e6:.2f}",
                number(median(each.ms for each in its)),
                f"{number(min(each.ms for each in its))} .. {number(max(each.ms for each in its))}",
                number(median(speeds)) if speeds else "-",
                number(median(each.ttft_ms for each in its)),
            )
        )
    head = (
        "prompt",
        "KV, MB",
        "copied, MB",
        "hand-over, ms",
        "fastest .. slowest",
        "GB/s",
        "TTFT, ms",
    )
    return Table("Hand-over, by transport and prompt length", head, tuple(rows))


def handover_findings(handed: Sequence[Handed], read_gb_s: float) -> list[str]:
    """The cost of the longest prompt by transport, and whether the figures are plausible."""
    if not handed:
        return ["No hand-over was measured."]
    longest = max(each.prompt for each in handed)
    parts = []
    for (transport, prompt), its in grouped(handed).items():
        if prompt != longest:
            continue
        speeds = [each.gb_per_s for each in its if each.gb_per_s is not None]
        how = f"{number(median(speeds))} GB/s" if speeds else "nothing copied"
        parts.append(f"{number(median(e.ms for e in its))} ms by {WAYS[transport]} ({how})")
    size = max(each.kv_bytes for each in handed if each.prompt == longest)
    sentences = [
        f"Handing over the KV of {longest:,} tokens ({size / 1e6:.1f} MB) takes {', '.join(parts)}; "
        "medians, measured by the writer."
    ]
    wrong = too_fast(handed, read_gb_s)
    fastest = max((each.gb_per_s or 0.0 for each in handed), default=0.0)
    if wrong:
        sentences += wrong
    elif fastest:
        sentences.append(
            f"The fastest copy moved {number(fastest)} GB/s, below the {number(read_gb_s)} GB/s that "
            "this machine's memory reads, as it must be."
        )
    return sentences


def grouped(handed: Sequence[Handed]) -> dict[tuple[str, int], list[Handed]]:
    """By transport and prompt length, in the order of measuring."""
    groups: dict[tuple[str, int], list[Handed]] = {}
    for each in handed:
        groups.setdefault((each.transport, each.prompt), []).append(each)
    return groups
