"""Cells of the disaggregation study: metric by load, P/D beside the best colocated arm, and the
sentences computed from them. Pure.

    a cell wins    in every round P/D is the better, and by the median by EVEN at least
    it loses       in every round P/D is the worse, and by as much
    no difference  anything else: rounds that disagree, or a difference nobody would notice
    not comparable a gap below TOGETHER_MS is none: the tokens reached a busy client together, and the
                   median gap says how, not how long somebody waited
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isinf
from statistics import median

from tools.lab.disagg_plan import PD
from tools.lab.study import Table

WINS, LOSES, EVEN_CELL, UNCLEAR = "wins", "loses", "no difference", "not comparable"
TOGETHER_MS = 0.1
EVEN = 0.05
LESS, MORE = -1, 1  # which is better
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
Round = Mapping[str, float]  # one arm's numbers of one round, by metric
Rounds = Mapping[int, Round]  # by the round's number: one that failed is not there


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric under one load. `ratios`: P/D to the best colocated arm, round by round."""

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
        """By the rule above."""
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
    """Of one load; none if P/D or everything else is missing. The best colocated arm is that with
    the best median of the rounds it shares with P/D."""
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
    """Cell by cell, those where P/D loses as plainly as those where it wins."""
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
    title = "P/D beside the best colocated arm, cell by cell"
    return Table(
        title, ("load: metric", PD, *others, "P/D : best colocated", "verdict"), tuple(rows)
    )


def conclusion(cells: Sequence[Cell]) -> list[str]:
    """For which traffic it pays on this machine, as far as was measured."""
    if not cells:
        return ["P/D was not measured beside a colocated cluster: nothing can be said about it."]
    kinds = (WINS, LOSES, EVEN_CELL, UNCLEAR)
    count = {kind: sum(cell.verdict == kind for cell in cells) for kind in kinds}
    rounds = max(len(cell.ratios) for cell in cells)
    agree = "the one round says so" if rounds == 1 else "all rounds agree"
    return [
        *(_of_load(load, its) for load, its in _grouped(cells, "load").items()),
        f"Of {len(cells)} cells P/D wins {count[WINS]} and loses {count[LOSES]}; no difference: "
        f"{count[EVEN_CELL]}; not comparable, for tokens reached the client together: "
        f"{count[UNCLEAR]}. A cell counts if {agree} and the median is off by {EVEN:.0%} or more; "
        "P/D is held against the better of the colocated arms each time.",
        _pays(cells),
    ]


def _of_load(load: str, cells: Sequence[Cell]) -> str:
    said = []
    for verdict in (WINS, LOSES):
        hits = [f"{c.metric} ({times(c.ratio)} times)" for c in cells if c.verdict == verdict]
        said.append(f"{verdict} {', '.join(hits)}" if hits else f"{verdict} nothing")
    return f"{load}: P/D {'; '.join(said)}."


def _pays(cells: Sequence[Cell]) -> str:
    """A metric that is won somewhere and lost nowhere pays; and the other way round."""
    pays, costs, both = [], [], []
    for metric, its in _grouped(cells, "metric").items():
        found = {cell.verdict for cell in its}
        if {WINS, LOSES} <= found:
            both.append(metric)
        elif WINS in found:
            pays.append(metric)
        elif LOSES in found:
            costs.append(metric)
    said = [
        f"it pays for traffic that is judged by {_listed(pays)}" if pays else "",
        f"it costs traffic that is judged by {_listed(costs)}" if costs else "",
        f"it depends on the load for {_listed(both)}" if both else "",
    ]
    if not any(said):
        return "So on this machine the split makes no difference that was measured."
    if not pays and not both:
        said[0] = "no traffic measured here gains by the split"
    return f"So on this machine {'; '.join(each for each in said if each)}."


def _grouped(cells: Sequence[Cell], key: str) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(getattr(cell, key), []).append(cell)
    return groups


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def goodput_sentence(cells: Sequence[Cell], slo: str) -> str:
    """Requests within the limits: which arm serves more of them, rate by rate."""
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
    """What the streams' tokens wait for while long prompts arrive."""
    parts = [
        f"{number(median(each['itl_max'] for each in rounds.values()))} ms with {arm} "
        f"(p99 {number(median(each['itl_p99'] for each in rounds.values()))})"
        for arm, rounds in arms.items()
        if rounds
    ]
    if not parts:
        return f"What streams wait for beside long prompts was not measured ({load})."
    return (
        f"The longest wait between two tokens ({load}): {', '.join(parts)}; medians of the rounds."
    )


def spread(ratios: Sequence[float]) -> str:
    """The median, and what the rounds said."""
    if len(ratios) == 1:
        return times(ratios[0])
    return f"{times(median(ratios))} ({times(min(ratios))} .. {times(max(ratios))})"


def times(ratio: float) -> str:
    """A ratio, for people."""
    return "∞" if isinf(ratio) else number(ratio)


def number(value: float) -> str:
    """Three digits, for people. A latency without end is that of a token that never came."""
    if isinf(value):
        return "never"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(ours: float, theirs: float) -> float:
    if ours == theirs:  # both nothing, or both for ever
        return 1.0
    return ours / theirs if theirs else inf


def _gain(ratio: float, better: int) -> float:
    if better == MORE:
        return ratio
    return 1 / ratio if ratio else inf
