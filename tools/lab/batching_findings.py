"""Findings of the batching study, computed from its cells. Pure.

    queueing + execution = total latency       of each request, from the router's timestamps

Rates are compared within rounds: on a shared machine a slow minute hits all cells of its round alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

from tools.lab.phrasing import SAME, change, number, percent
from tools.lab.shares import FEWEST, basis, shorter
from tools.lab.study import Table
from tools.measure.slo import percentile

KNEE = 0.20  # least gain in throughput for which a doubling of the batch is worth it
PAYS = 0.05  # least rise of throughput that counts as a gain
BURST, STAGGERED = "burst", "staggered"
LOADS = (BURST, STAGGERED)


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch size, window and load: the requests of all rounds (ms), each round's rates, and the
    cores that each process kept busy."""

    batch: int
    window_ms: float
    load: str
    queueing: tuple[float, ...]
    execution: tuple[float, ...]
    total: tuple[float, ...]
    requests_per_s: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    cores: Mapping[str, float]
    peak_cores: float
    gpu_percent: float | None = None

    @property
    def rate(self) -> float:
        """Tokens/s of the median round."""
        return median(self.tokens_per_s)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of two cells' throughput, within rounds."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{number(self.middle)} times"
        return f"{number(self.middle)} times ({number(self.least)} to {number(self.most)} in the rounds)"

    @property
    def doubtful(self) -> str:
        """A warning if the rounds disagree on which is faster; else empty."""
        apart = self.least < 1 - SAME and self.most > 1 + SAME
        return (
            " The rounds disagree on which is faster: this is noise, run it again." if apart else ""
        )


def ratio(before: Cell, after: Cell) -> Ratio:
    """`after` over `before`."""
    each = [b / a for a, b in zip(before.tokens_per_s, after.tokens_per_s, strict=False) if a > 0]
    return Ratio(median(each), min(each), max(each))


def latency_table(title: str, cells: Sequence[Cell], machine_cores: int) -> Table:
    """A line for each cell."""
    header = (
        *(
            "batch size",
            "window, ms",
            "load",
            "requests",
            "queueing, mean ms",
            "execution, mean ms",
        ),
        *("latency, mean ms", "P95, ms", "P99, ms", "requests/s", "tokens/s", "cores busy"),
    )
    rows = tuple(
        (
            *(str(c.batch), f"{c.window_ms:g}", c.load, str(len(c.total))),
            *(_ms(mean(c.queueing)), _ms(mean(c.execution)), _ms(mean(c.total))),
            *(_ms(percentile(c.total, 95)), _ms(percentile(c.total, 99))),
            *(number(median(c.requests_per_s)), number(c.rate)),
            percent(busy(c) / machine_cores) if c.cores else "",
        )
        for c in cells
    )
    return Table(title, header, rows)


def usage_table(cells: Sequence[Cell]) -> Table:
    """Busy cores by process, and GPU utilisation if there is a GPU."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.cores))
    with_gpu = any(cell.gpu_percent is not None for cell in cells)
    header = ("batch size", "window, ms", "load", *names, "all", "busiest second")
    rows = [
        (
            *(str(c.batch), f"{c.window_ms:g}", c.load),
            *(number(c.cores.get(name, 0.0)) for name in names),
            *(number(busy(c)), number(c.peak_cores)),
            *([_percent(c.gpu_percent)] if with_gpu else []),
        )
        for c in cells
    ]
    return Table(
        "Device utilisation (cores kept busy)",
        (*header, *(["GPU"] if with_gpu else [])),
        tuple(rows),
    )


def request_table(cell: Cell, most: int) -> Table:
    """The first requests of a cell one by one; all of them are in the JSONL."""
    times = zip(cell.queueing, cell.execution, cell.total, strict=True)
    rows = tuple((str(number), *map(_ms, each)) for number, each in enumerate(times, start=1))
    title = f"Each request of a {cell.load} (batch size {cell.batch}, window {cell.window_ms:g} ms)"
    header = ("request", "queueing, ms", "execution, ms", "total latency, ms")
    return Table(title, header, rows[:most])


def findings(sizes: Sequence[Cell], windows: Sequence[Cell], machine_cores: int) -> list[str]:
    """All sentences. `sizes` are cells that differ in batch size, `windows` in the window."""
    sentences: list[str] = []
    burst, staggered = (
        sorted((c for c in sizes if c.load == load), key=lambda c: c.batch) for load in LOADS
    )
    if len(burst) >= 2:
        sentences += [
            verdict(burst),
            *trades(burst),
            knee(burst),
            utilisation(burst, machine_cores),
        ]
    if len(staggered) >= 2:
        sentences.append(calm(staggered))
    for load in (STAGGERED, BURST):
        cells = sorted((c for c in windows if c.load == load), key=lambda c: c.window_ms)
        if len(cells) >= 2:
            sentences.append(window(cells))
    return sentences or ["Nothing to compare: only one batch size and one window were measured."]


def verdict(cells: Sequence[Cell]) -> str:
    """Whether a larger batch pays, and which one most."""
    first = cells[0]
    best = max(cells[1:], key=lambda c: ratio(first, c).middle)
    gain = ratio(first, best)
    where = f"{_load(first)}, window {first.window_ms:g} ms"
    rests = f"{_basis(first, best)}; threshold {percent(PAYS)}"
    if not enough(first, best):
        sooner = shorter(best.total, first.total)
        return (
            f"**No verdict on batching** ({where}): {rests}, and below {FEWEST} requests a cell there is "
            f"none. Batch {best.batch} made {number(best.rate)} tokens/s, {gain} those of batch "
            f"{first.batch}; {sooner} of its requests were done sooner than the median one at batch "
            f"{first.batch}."
        )
    if gain.middle - 1 <= PAYS:
        return (
            f"**Batching does not pay here** ({where}): no batch size brings more than {percent(PAYS)} "
            f"over batch {first.batch} ({number(first.rate)} tokens/s); the best, batch {best.batch}, "
            f"has {gain} its throughput ({rests}).{gain.doubtful}"
        )
    return (
        f"**Batching pays** ({where}): batch {best.batch} makes {number(best.rate)} tokens/s, {gain} "
        f"those of batch {first.batch} ({number(first.rate)}; {rests}).{gain.doubtful}"
    )


def enough(*cells: Cell) -> bool:
    """Whether these cells have the requests that a verdict needs."""
    return all(len(cell.total) >= FEWEST for cell in cells)


def _basis(*cells: Cell) -> str:
    """Requests and seconds of a round, of the cell that has the fewest requests."""
    cell = min(cells, key=lambda each: len(each.total))
    rounds = len(cell.requests_per_s)
    requests = len(cell.total)
    window_s = requests / max(1, rounds) / max(1e-9, median(cell.requests_per_s))
    return f"{basis(requests, rounds, window_s)} a cell"


def trades(cells: Sequence[Cell]) -> list[str]:
    """The latency paid for throughput: the smallest batch against every other."""
    first = cells[0]
    return [
        f"From batch {first.batch} to {other.batch}: throughput x {number(ratio(first, other).middle)}; "
        f"execution {_change(first.execution, other.execution)}, queueing "
        f"{_change(first.queueing, other.queueing)}, so the mean latency "
        f"{_change(first.total, other.total)} and P95 "
        f"{change(percentile(first.total, 95), percentile(other.total, 95))}."
        for other in cells[1:]
    ]


def knee(cells: Sequence[Cell]) -> str:
    """The batch size after which a doubling gains less than KNEE. A larger step is split evenly."""
    if not enough(*cells):
        return f"No verdict on a knee: {_basis(*cells)} are fewer than {FEWEST}."
    for before, after in pairwise(cells):
        doublings = math.log2(after.batch / before.batch)
        gain = ratio(before, after).middle ** (1 / doublings) - 1
        if gain < KNEE:
            return (
                f"The knee is at batch {before.batch}: a doubling from there towards {after.batch} "
                f"brings {percent(gain)} more tokens/s, less than {percent(KNEE)} ({_basis(*cells)})."
            )
    return (
        f"There is no knee up to batch {cells[-1].batch}: every doubling brings at least "
        f"{percent(KNEE)} more tokens/s ({_basis(*cells)})."
    )


def utilisation(cells: Sequence[Cell], machine_cores: int) -> str:
    """Busy cores at the smallest and the largest batch."""
    first, last = cells[0], cells[-1]
    if not (first.cores and last.cores):
        return "Core utilisation is unknown here: the system has no /proc."
    text = (
        f"The cluster keeps {percent(busy(first) / machine_cores)} of {machine_cores} cores busy at "
        f"batch {first.batch} and {percent(busy(last) / machine_cores)} at batch {last.batch}"
    )
    if busy(first) <= 0 or busy(last) <= 0:
        return text + "."
    each = [cell.rate / busy(cell) for cell in (first, last)]
    return f"{text}; a second of one core makes {number(each[0])} and {number(each[1])} tokens."


def calm(cells: Sequence[Cell]) -> str:
    """Staggered arrivals set the throughput, so only latency can change."""
    first, last = cells[0], cells[-1]
    return (
        f"Under {_load(first)} the arrivals set the pace ({number(first.rate)} and {number(last.rate)} "
        f"tokens/s); from batch {first.batch} to {last.batch} queueing "
        f"{_change(first.queueing, last.queueing)}, execution "
        f"{_change(first.execution, last.execution)}, and the mean latency "
        f"{_change(first.total, last.total)}."
    )


def window(cells: Sequence[Cell]) -> str:
    """What the window costs in queueing, and what it gains."""
    first, last = cells[0], cells[-1]
    waited = mean(last.queueing) - mean(first.queueing)
    cost = f"cost {number(waited)} ms of queueing a request" if waited > 0 else "cost no queueing"
    text = (
        f"A window of {last.window_ms:g} ms instead of {first.window_ms:g} at batch {first.batch} "
        f"({_load(first)}) {cost} ({number(mean(first.queueing))} to {number(mean(last.queueing))} ms; "
        f"mean latency {_change(first.total, last.total)})"
    )
    if first.load == STAGGERED:
        return f"{text}; the arrivals set the pace, so it cannot gain throughput."
    gain = ratio(first, last)
    if not enough(first, last):
        few = f"{_basis(first, last)} are fewer than {FEWEST}"
        return f"{text}: {gain} the tokens/s; no verdict, as {few}."
    gained = "gained nothing" if gain.middle - 1 <= PAYS else "gained throughput"
    rests = f"{_basis(first, last)}; threshold {percent(PAYS)}"
    return f"{text}, and {gained}: {gain} the tokens/s ({rests}).{gain.doubtful}"


def busy(cell: Cell) -> float:
    """Busy cores of all processes together."""
    return sum(cell.cores.values())


def _load(cell: Cell) -> str:
    count = len(cell.total)
    return f"a burst, {count} requests" if cell.load == BURST else f"{count} staggered requests"


def _change(before: Sequence[float], after: Sequence[float]) -> str:
    a, b = mean(before), mean(after)
    return f"{change(a, b)} ({number(a)} to {number(b)} ms)"


def _ms(value: float) -> str:
    return number(value)


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value / 100)
