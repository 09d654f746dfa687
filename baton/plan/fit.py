"""Fit: the Machine that explains the times of recorded requests, by least squares. Pure.

Each row says what an interval of seconds consists of:

    seconds = forwards x slower x (forward_s + streams x row_s) + prompt tokens x slower' x token_s

    a stream's tokens, eight by eight     as many forwards; prompts that its worker fills meanwhile
    the time in which prefill had work    as many forwards as the worker cuts such prompts into
    a prompt that its decode worker fills likewise, with the streams there

`slower`: a worker shares cores with others that compute. How much, is tried; the rest is linear. The
router's ways (queue, batching, hand-out of cores) are no part of it: the simulation has them. Prompt
tokens count by position, as baton/pace.py does. Which of several workers of a role served a request is
not recorded: each counts as having its share of all that runs.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, sqrt
from operator import mul

import numpy

from baton.pace import CONTEXT, FURTHEST, Pace
from baton.plan.machine import Machine
from baton.plan.recorded import Recorded, Setting

STEPS = 8
"""Tokens of a stream between two rows: fewer, and when messages are sent blurs them."""
TURNS = 5
"""How many forwards a prompt took depends on what is looked for, so it is repeated."""
FORWARD_POWERS, TOKEN_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.5, 0.75, 1.0, 1.25)
LEAST_S = 1e-7
SHARED_S = 0.001
"""A hand-over that takes less, for a usual prompt, copies nothing."""
HOPS = 2  # messages within the time in which a prefill worker has a prompt


@dataclass(frozen=True, slots=True)
class Row:
    """`beside`: part of the time in which workers of the other role computed too."""

    seconds: float
    forwards: float  # 0: as many as the prompts take
    streams: float
    weight: float  # prompt tokens, by position
    beside: float
    prefill: bool


def fit(
    recorded: Sequence[Recorded], setting: Setting, kv_bytes_per_token: int = 1 << 16
) -> Machine:
    """The machine whose forwards explain these requests best."""
    machine = Machine(
        LEAST_S, LEAST_S, cores=setting.cores, kv_bytes_per_token=kv_bytes_per_token,
        kv_bytes_per_s=_kv_bytes_per_s(recorded, kv_bytes_per_token),
    )  # fmt: skip
    rows = [
        *_streams(recorded, setting),
        *_remote(recorded, setting, machine),
        *_local(recorded, setting),
    ]
    sharing = setting.cores and setting.prefills
    powers = (
        product(FORWARD_POWERS, TOKEN_POWERS)
        if sharing
        else [(machine.forward_power, machine.token_power)]
    )
    tried = [
        _solved(rows, setting, replace(machine, forward_power=f, token_power=t)) for f, t in powers
    ]
    return min(tried, key=lambda each: each[0])[1]


# ---- rows


class _Level:
    """A sum of heights over intervals of time, and its mean over any other."""

    def __init__(self, intervals: Iterable[tuple[float, float, float]]) -> None:
        changes = sorted(
            change for a, b, height in intervals if b > a for change in ((a, height), (b, -height))
        )
        self._times, self._areas, self._heights = [0.0], [0.0], [0.0]
        height = area = 0.0
        for at, more in changes:
            area += height * (at - self._times[-1])
            height += more
            self._times.append(at)
            self._areas.append(area)
            self._heights.append(height)

    def area(self, begin: float, end: float) -> float:
        return self._until(end) - self._until(begin)

    def _until(self, at: float) -> float:
        index = max(0, bisect_right(self._times, at) - 1)
        return self._areas[index] + self._heights[index] * (at - self._times[index])


def _streams(recorded: Sequence[Recorded], setting: Setting) -> list[Row]:
    running = _Level((each.tokens[0], each.tokens[-1], 1.0) for each in recorded)
    filling = _Level(
        _busy((each.began, each.began + each.fill_s) for each in recorded if each.fill_s)
    )
    local = _Level(
        (each.began, each.tokens[0], _weight(each) / max(LEAST_S, each.tokens[0] - each.began))
        for each in recorded
        if not each.fill_s
    )
    rows = []
    for each in recorded:
        for index in range(0, len(each.tokens) - STEPS, STEPS):
            a, b = each.tokens[index], each.tokens[index + STEPS]
            if b > a:
                streams = max(1.0, running.area(a, b) / (b - a) / setting.decodes)
                weight = local.area(a, b) / setting.decodes
                beside = filling.area(a, b) / (b - a)
                rows.append(Row(b - a, STEPS, streams, weight, beside, prefill=False))
    return rows


def _remote(recorded: Sequence[Recorded], setting: Setting, machine: Machine) -> list[Row]:
    """Where several workers fill, each prompt counts as if it had one for itself."""
    spans = [(r.began, r.began + r.fill_s, _weight(r)) for r in recorded if r.fill_s]
    weights = _Level((a, b, weight / max(LEAST_S, b - a)) for a, b, weight in spans)
    running = _Level(_busy((each.tokens[0], each.tokens[-1]) for each in recorded))
    alone = setting.prefills == 1
    busy = _busy((a, b) for a, b, _ in spans) if alone else [(a, b, 1.0) for a, b, _ in spans]
    rows = []
    for index, (a, b, _) in enumerate(busy):
        weight = weights.area(a, b) if alone else spans[index][2]
        seconds = max(LEAST_S, b - a - HOPS * machine.hop_s)
        rows.append(Row(seconds, 0, 0.0, weight, running.area(a, b) / (b - a), prefill=True))
    return rows


def _local(recorded: Sequence[Recorded], setting: Setting) -> list[Row]:
    running = _Level((each.tokens[0], each.tokens[-1], 1.0) for each in recorded)
    filling = _Level(
        _busy((each.began, each.began + each.fill_s) for each in recorded if each.fill_s)
    )
    own = [each for each in recorded if not each.fill_s and each.tokens[0] > each.began]
    weights = _Level(
        (each.began, each.tokens[0], _weight(each) / (each.tokens[0] - each.began)) for each in own
    )
    rows = []
    for each in own:
        a, b = each.began, each.tokens[0]
        weight = max(_weight(each), weights.area(a, b) / setting.decodes)
        streams = running.area(a, b) / (b - a) / setting.decodes
        rows.append(Row(b - a, 0, streams, weight, filling.area(a, b) / (b - a), prefill=False))
    return rows


def _busy(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """Intervals in which there is at least one."""
    found: list[tuple[float, float, float]] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(b, found[-1][1]), 1.0)
        else:
            found.append((a, b, 1.0))
    return found


def _weight(each: Recorded) -> float:
    """All but the last token, which decode computes in any case."""
    tokens = each.prompt_tokens - 1
    return tokens * (1 + tokens / 2 / CONTEXT)


def _kv_bytes_per_s(recorded: Sequence[Recorded], each_token: int) -> float:
    """0 where memory is shared."""
    sent = [each for each in recorded if each.fill_s]
    tokens = sum(each.prompt_tokens for each in sent)
    seconds = sum(each.handover_s for each in sent)
    return 0.0 if seconds <= SHARED_S * len(sent) else tokens * each_token / seconds


# ---- least squares


def _solved(rows: Sequence[Row], setting: Setting, machine: Machine) -> tuple[float, Machine]:
    """The rest (mean square of relative errors) and the machine with these powers."""
    counts = {kind: sum(_kind(each) == kind for each in rows) for kind in map(_kind, rows)}
    expected = [each.seconds for each in rows]
    shortest = min(each.seconds / max(1.0, each.forwards) for each in rows)
    heaviest = max(rows, key=lambda each: each.weight)
    found = [shortest / 2, 0.0, max(LEAST_S, heaviest.seconds / max(1.0, heaviest.weight) / 2)]
    rest = 0.0
    for _ in range(TURNS):
        # kinds count alike; errors are relative to what is expected, or slow rows would count too little
        scale = [
            1 / (max(s, each.seconds / FURTHEST) * sqrt(counts[_kind(each)]))
            for s, each in zip(expected, rows, strict=True)
        ]
        lines = [_line(each, setting, machine, found) for each in rows]
        matrix = numpy.array([[s * x for x in line] for s, line in zip(scale, lines, strict=True)])
        wanted = numpy.array([s * each.seconds for s, each in zip(scale, rows, strict=True)])
        found = _positive(matrix, wanted)
        expected = [sum(map(mul, line, found)) for line in lines]
        rest = float(numpy.square(matrix @ numpy.array(found) - wanted).sum())
    forward_s, row_s, token_s = found
    return rest, replace(
        machine, forward_s=max(LEAST_S, forward_s), row_s=row_s, token_s=max(LEAST_S, token_s)
    )


def _kind(row: Row) -> tuple[bool, bool]:
    return row.prefill, row.forwards > 0


def _line(
    row: Row, setting: Setting, machine: Machine, found: Sequence[float]
) -> tuple[float, float, float]:
    """What forward_s, row_s and token_s are multiplied with."""
    fixed, tokens = 1.0, 1.0
    if setting.cores:
        same, all_ = (
            (setting.prefills if row.prefill else setting.decodes),
            setting.prefills + setting.decodes,
        )
        shares = ((same, 1 - row.beside), (all_, row.beside))
        fixed = sum(n**machine.forward_power * part for n, part in shares)
        tokens = sum(n**machine.token_power * part for n, part in shares)
    forwards = row.forwards or _forwards(row, setting, found, fixed, tokens)
    return forwards * fixed, forwards * fixed * row.streams, row.weight * tokens


def _forwards(
    row: Row, setting: Setting, found: Sequence[float], fixed: float, tokens: float
) -> int:
    """Into how many the worker cuts such prompts."""
    forward_s = max(LEAST_S, (found[0] + found[1] * row.streams) * fixed)
    pace = Pace(forward_s, max(LEAST_S, found[2] * tokens))
    limited = pace.limited(setting.slo_itl_s if row.streams >= 0.5 else 0.0)
    return max(1, ceil(row.weight * pace.token_s / limited.space_s()))


def _positive(matrix: "numpy.ndarray", wanted: "numpy.ndarray") -> list[float]:
    """Least squares without negative times: what would be negative is 0, the others are solved again."""
    columns = [index for index in range(matrix.shape[1]) if matrix[:, index].any()]
    while columns:
        part = numpy.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
        worst = int(part.argmin())
        if part[worst] >= 0:
            found = [0.0] * matrix.shape[1]
            for index, value in zip(columns, part, strict=True):
                found[index] = float(value)
            return found
        del columns[worst]
    return [0.0] * matrix.shape[1]
