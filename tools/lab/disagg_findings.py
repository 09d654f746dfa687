"""Findings of the disaggregation study, computed from its numbers. Pure.

A cell is one metric under one load: P/D beside the best colocated arm.

    no verdict      one side has fewer than FEWEST requests: the shares within the SLO are told instead
    wins            P/D is better in every round, and the median by EVEN at least
    loses           P/D is worse in every round, and the median by as much
    no difference   anything else: rounds that disagree, or a difference too small to matter
    not comparable  the median gap is below TOGETHER_MS: tokens reached a busy client together, so the
                    gap says how they arrived, not how long a reader waited

Goodput is the share of requests within the SLO times the offered rate, over a window of fixed length. It
wins or loses only if the intervals of the two shares are apart as well.

A hand-over moves one request's KV to the decode worker. Its bytes and time are the writer's receipt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from tools.lab.phrasing import listed, number, percent, spread, times
from tools.lab.shares import FEWEST, Share, basis
from tools.lab.study import Table
from tools.measure.split import PD

WINS, LOSES, EVEN_CELL, UNCLEAR = "wins", "loses", "no difference", "not comparable"
TOO_FEW = "no verdict"
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

GOODPUT = "goodput"
COUNTS = {"long_ttft_p50": "long_requests"}
"""Metrics whose requests are not those that a round counts as "requests"."""

Metric = tuple[str, str, str, int]
Round = Mapping[str, float]
"""One arm's numbers in one round, by metric; and `requests`, `met` (those within the SLO), `window_s`."""
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
    requests: int  # of the side that has fewer, over all rounds
    window_s: float  # of one round
    shares: Mapping[str, Share]  # of the requests within the SLO, by arm

    @property
    def ratio(self) -> float:
        """The median."""
        return median(self.ratios)

    @property
    def verdict(self) -> str:
        """The verdict, by the rule above."""
        if self.requests < FEWEST:
            return TOO_FEW
        if self.unit == "ms" and min(self.ours, self.others[self.best]) < TOGETHER_MS:
            return UNCLEAR
        gains = [_gain(each, self.better) for each in self.ratios]
        middle = median(gains)
        if self.metric == GOODPUT and not self.shares[PD].apart(self.shares[self.best]):
            return EVEN_CELL
        if min(gains) > 1 and middle >= 1 + EVEN:
            return WINS
        if max(gains) < 1 and middle <= 1 / (1 + EVEN):
            return LOSES
        return EVEN_CELL


def cells_of(load: str, arms: Mapping[str, Rounds], metrics: Sequence[Metric]) -> list[Cell]:
    """The cells of one load; empty without P/D or without a colocated arm. The best colocated arm has the
    best median over the rounds it shares with P/D."""
    found = []
    ours = arms.get(PD, {})
    shared = {
        other: sorted(ours.keys() & rounds.keys()) for other, rounds in arms.items() if other != PD
    }
    shared = {other: rounds for other, rounds in shared.items() if rounds}
    for key, name, unit, better in metrics if shared else ():
        medians = {other: median(arms[other][n][key] for n in its) for other, its in shared.items()}
        best = (max if better == MORE else min)(medians, key=lambda other: medians[other])
        rounds = shared[best]
        count = COUNTS.get(key, "requests")
        found.append(
            Cell(
                load,
                name,
                unit,
                better,
                ours=median(ours[n][key] for n in rounds),
                others=medians,
                best=best,
                ratios=tuple(_ratio(ours[n][key], arms[best][n][key]) for n in rounds),
                requests=min(
                    int(sum(side[n][count] for n in rounds)) for side in (ours, arms[best])
                ),
                window_s=ours[rounds[0]]["window_s"],
                shares=shares_of(arms),
            )
        )
    return found


def shares_of(arms: Mapping[str, Rounds]) -> dict[str, Share]:
    """The requests within the SLO, by arm, over all rounds."""
    return {
        arm: Share(
            int(sum(each["met"] for each in rounds.values())),
            int(sum(each["requests"] for each in rounds.values())),
        )
        for arm, rounds in arms.items()
        if rounds
    }


def cell_table(cells: Sequence[Cell], arms: Sequence[str]) -> Table:
    """A row for each cell, losses and wins alike."""
    others = [arm for arm in arms if arm != PD]
    rows = [
        (
            f"{cell.load}: {cell.metric}" + (f", {cell.unit}" if cell.unit else ""),
            number(cell.ours),
            *(number(cell.others[arm]) if arm in cell.others else "-" for arm in others),
            spread(cell.ratios),
            basis(cell.requests, len(cell.ratios), cell.window_s),
            f"P/D {cell.verdict}" if cell.verdict in (WINS, LOSES) else cell.verdict,
        )
        for cell in cells
    ]
    title = f"P/D against the best colocated arm, cell by cell (threshold {percent(EVEN)})"
    header = ("load: metric", PD, *others, "P/D : best colocated", "rests on", "verdict")
    return Table(title, header, tuple(rows))


def share_table(cells: Sequence[Cell]) -> Table:
    """The requests within the SLO of every load and arm, with Wilson's intervals."""
    rows = []
    for load, its in grouped_by(cells, "load").items():
        cell = its[0]
        for arm, share in cell.shares.items():
            low, high = share.interval
            rows.append(
                (
                    f"{load}, {arm}",
                    str(share.of),
                    f"{len(cell.ratios)} x {number(cell.window_s)} s",
                    str(share.good),
                    percent(share.value),
                    f"{percent(low)} .. {percent(high)}",
                )
            )
    header = ("load, arm", "requests", "windows", "within the SLO", "share", "95% interval")
    return Table("Requests within the SLO", header, tuple(rows))


def conclusion(cells: Sequence[Cell]) -> list[str]:
    """For which of the measured traffic the split pays on this machine."""
    if not cells:
        return ["P/D was not measured beside a colocated cluster: no conclusion."]
    kinds = (WINS, LOSES, EVEN_CELL, UNCLEAR, TOO_FEW)
    count = {kind: sum(cell.verdict == kind for cell in cells) for kind in kinds}
    rounds = max(len(cell.ratios) for cell in cells)
    agree = "the one round agrees" if rounds == 1 else "all rounds agree"
    return [
        *(_of_load(load, its) for load, its in grouped_by(cells, "load").items()),
        f"Of {len(cells)} cells P/D wins {count[WINS]} and loses {count[LOSES]}; no difference: "
        f"{count[EVEN_CELL]}; not comparable, as tokens reached the client together: "
        f"{count[UNCLEAR]}; no verdict, with fewer than {FEWEST} requests: {count[TOO_FEW]}. A cell "
        f"counts if {agree} and the median is off by {percent(EVEN)} or more; goodput also needs "
        "intervals that are apart. P/D is always compared with the better colocated arm.",
        _pays(cells),
    ]


def _of_load(load: str, cells: Sequence[Cell]) -> str:
    decided = [cell for cell in cells if cell.verdict != TOO_FEW]
    if not decided:
        first = cells[0]
        shares = "; ".join(f"{arm} {share}" for arm, share in first.shares.items())
        rests = basis(first.requests, len(first.ratios), first.window_s)
        few = f"{rests} are fewer than {FEWEST}"
        return f"{load}: no verdict, as {few}. Requests within the SLO: {shares}."
    first = decided[0]
    sentences = []
    for verdict in (WINS, LOSES):
        hits = [f"{c.metric} ({times(c.ratio)} times)" for c in decided if c.verdict == verdict]
        sentences.append(f"{verdict} {', '.join(hits)}" if hits else f"{verdict} nothing")
    rests = basis(first.requests, len(first.ratios), first.window_s)
    return f"{load} ({rests} an arm; threshold {percent(EVEN)}): P/D {'; '.join(sentences)}."


def _pays(cells: Sequence[Cell]) -> str:
    """A metric with wins and no losses pays; one with losses and no wins costs."""
    if all(cell.verdict == TOO_FEW for cell in cells):
        return f"So this run decides nothing: every cell has fewer than {FEWEST} requests."
    pays, costs, both = [], [], []
    for metric, its in grouped_by(cells, "metric").items():
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


def grouped_by(cells: Sequence[Cell], key: str) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(getattr(cell, key), []).append(cell)
    return groups


def goodput_sentence(cells: Sequence[Cell], slo: str) -> str:
    """Which arm serves more requests within the SLO, rate by rate; with fewer than FEWEST requests, the
    shares alone."""
    its = [cell for cell in cells if cell.metric == GOODPUT]
    if not its:
        return f"Goodput ({slo}) was not measured for P/D and a colocated arm."
    parts = []
    for cell in its:
        rests = basis(cell.requests, len(cell.ratios), cell.window_s)
        shares = f"P/D {cell.shares[PD]}, {cell.best} {cell.shares[cell.best]}"
        if cell.verdict == TOO_FEW:
            parts.append(f"{cell.load}: {shares}; no verdict, as {rests} are fewer than {FEWEST}")
        else:
            ours, theirs = number(cell.ours), number(cell.others[cell.best])
            parts.append(
                f"{cell.load}: {ours}/s against {theirs} ({cell.verdict}; {shares}; {rests} an arm)"
            )
    return (
        f"Goodput, the share within the SLO ({slo}) times the offered rate, P/D against the better "
        f"colocated arm. {'. '.join(parts)}."
    )


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
        f"{each.transport} reports {number(each.gb_per_s)} GB/s for {each.prompt} tokens, more than the "
        f"{number(read_gb_s)} of this machine's memory: its bytes or its time are wrong"
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
                number(its[0].kv_bytes / 1e6),
                number(its[0].moved_bytes / 1e6),
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
        f"Handing over the KV of {longest:,} tokens ({number(size / 1e6)} MB) takes {', '.join(parts)}; "
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
