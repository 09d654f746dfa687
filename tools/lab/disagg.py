"""The disaggregation study: does splitting prefill from decode pay, and when not?

    streams beside long prompts    how long do tokens of running requests wait?
    requests at random             TTFT, ITL and goodput at an SLO, against the arrival rate
    one prompt at a time           the cost of the hand-over, by length and transport

Three clusters that differ in the split alone (measure/split.py) run at the same time, on the same cores,
and take turns within each round. Every round draws new requests. Comparisons are made within a round.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from baton.clock import monotonic
from baton.errors import BatonError
from baton.machine import this_machine
from baton.model_files import resolve_model
from tools.lab.disagg_findings import (
    EVEN,
    RATE_METRICS,
    STREAM_METRICS,
    TOGETHER_MS,
    Cell,
    Handed,
    Rounds,
    cell_table,
    cells_of,
    conclusion,
    goodput_sentence,
    handover_findings,
    handover_table,
    interference_sentence,
    share_table,
    too_fast,
)
from tools.lab.disagg_plan import (
    CHUNK,
    STREAMS,
    Pace,
    Plan,
    model_of,
    pace_for,
    plan_for,
    rates_for,
)
from tools.lab.disagg_runs import (
    Arms,
    capacity,
    idle,
    measure_handover,
    measured,
    memory_read_gb_s,
    rates,
    streams,
)
from tools.lab.phrasing import number, percent
from tools.lab.plots import draw_handover, draw_interference, draw_rates
from tools.lab.questions import QUESTIONS
from tools.lab.shares import FEWEST
from tools.lab.study import Notebook, Picture, Setting, Study, Table
from tools.measure.slo import Slo, Trace
from tools.measure.split import CHUNKED, COLOCATED, PD


@dataclass(slots=True)
class Found:
    """All measurements; an empty field was not measured."""

    common: str = "nothing could be compared"
    slo: Slo | None = None
    capacity: float | None = None
    pace: Pace | None = None
    streams: Mapping[str, Rounds] = field(default_factory=dict)
    shown: Mapping[str, list[Trace]] = field(default_factory=dict)
    rates: Mapping[float, Mapping[str, Rounds]] = field(default_factory=dict)
    handed: list[Handed] = field(default_factory=list)
    read_gb_s: float = 0.0


def run(setting: Setting, notebook: Notebook) -> Study:
    """The whole study. Raises InputError or ModelError for a model that cannot be used at all."""
    begun = monotonic()
    already = len(notebook.failures)
    plan = plan_for(setting, resolve_model(model_of(setting)).max_positions)
    found = Found()
    try:
        with ExitStack() as stack:
            _compare(plan, setting, notebook, found, stack)
    except (BatonError, OSError) as error:
        notebook.failed("comparing the arms", error)
    found.read_gb_s = memory_read_gb_s()
    notebook.record("memory", read_gb_s=found.read_gb_s)
    found.handed = measure_handover(plan, notebook)
    for wrong in too_fast(found.handed, found.read_gb_s):
        notebook.failed("hand-over", wrong)
    cells = _cells(plan, found)
    return Study(
        name="disagg",
        title="Disaggregation",
        question=QUESTIONS["disagg"],
        varied="the split: P/D, colocated, colocated with chunked prefill; then the KV transport",
        fixed=_fixed(plan, found),
        command="python main.py lab disagg",
        findings=tuple(_findings(plan, found, cells)),
        tables=tuple(_tables(found, cells)),
        pictures=tuple(_pictures(setting, plan, found)),
        failures=tuple(notebook.failures[already:]),
        seconds=monotonic() - begun,
    )


def _compare(
    plan: Plan, setting: Setting, notebook: Notebook, found: Found, stack: ExitStack
) -> None:
    arms = Arms(plan, notebook)
    found.common = arms.start(stack)
    alone = idle(arms)
    if alone is None:
        raise BatonError("no idle request could be measured, and the loads are derived from it")
    found.slo, found.pace = alone.slo, pace_for(plan, alone.long_ttft_s)
    found.capacity = capacity(arms)
    found.streams, found.shown = streams(arms, found.pace, alone.slo)
    if found.capacity is None and not plan.rates:
        raise BatonError(
            "the capacity could not be measured, so there are no rates to try: set --rates"
        )
    wanted = rates_for(plan, found.capacity or 0.0, quick=setting.quick)
    found.rates = rates(arms, wanted, alone.slo)


def _streams_name(plan: Plan) -> str:
    return f"{STREAMS} streams beside {plan.long_prompt:,}-token prompts"


def _cells(plan: Plan, found: Found) -> list[Cell]:
    cells = cells_of(_streams_name(plan), found.streams, STREAM_METRICS)
    for rate, arms in found.rates.items():
        cells += cells_of(f"{rate:g} requests/s", arms, RATE_METRICS)
    return cells


def _fixed(plan: Plan, found: Found) -> dict[str, str]:
    fixed = {
        "machine": str(this_machine()),
        "model": f"{plan.model}, context {plan.context:,}",
        "clusters": f"on the CPU: {found.common}",
        "streams": f"{STREAMS}, beside {plan.long_prompts} prompts of {plan.long_prompt:,} tokens"
        + (f", one every {number(found.pace.every)} s" if found.pace else ""),
        "requests at random": f"Poisson arrivals for {_windows(plan, found)}, prompts of "
        f"{plan.prompt // 2} to {plan.prompt * 3 // 2} tokens, {plan.new_tokens} new tokens",
        "chunks": f"{CHUNK} tokens a step in the chunked arm; whole prompts in the colocated one",
        "ITL, TPOT": "at the client: each gap; the mean gap of a request",
        "prefix cache": "off, so that a repeated load costs the same",
        "rounds": f"{plan.rounds}, each with its own requests; the arms take turns within a round",
        "verdicts": f"from {FEWEST} requests a cell on; threshold {percent(EVEN)}, in every round",
        "hand-over": f"{plan.repeats} requests for each length and transport, one at a time",
    }
    if found.slo is not None:
        fixed["SLO"] = _slo(found.slo) + " (10 and 5 times those of an idle request)"
    return fixed


def _windows(plan: Plan, found: Found) -> str:
    """The window of each rate, by which goodput is counted."""
    windows = {rate: f"{number(plan.window_s(rate))} s" for rate in found.rates}
    if not windows:
        return f"{number(plan.seconds)} s or more"
    return ", ".join(f"{window} at {rate:g}/s" for rate, window in windows.items())


def _slo(slo: Slo) -> str:
    return (
        f"first token within {number(1e3 * slo.ttft_s)} ms, 99 of 100 gaps within "
        f"{number(1e3 * slo.itl_s)} ms"
    )


def _findings(plan: Plan, found: Found, cells: list[Cell]) -> list[str]:
    sentences = [interference_sentence(found.streams, _streams_name(plan))]
    if found.capacity is not None:
        sentences.append(
            f"A colocated cluster completes {number(found.capacity)} requests/s here when all come at "
            "once; the arrival rates are shares of that."
        )
    if found.slo is not None:
        sentences.append(goodput_sentence(cells, _slo(found.slo)))
    sentences += handover_findings(found.handed, found.read_gb_s)
    return sentences + conclusion(cells)


def _tables(found: Found, cells: list[Cell]) -> list[Table]:
    tables = [share_table(cells), cell_table(cells, (PD, COLOCATED, CHUNKED))] if cells else []
    return tables + ([handover_table(found.handed)] if found.handed else [])


def _pictures(setting: Setting, plan: Plan, found: Found) -> list[Picture]:
    pictures = []
    if found.shown and found.pace is not None:
        name = "disagg-interference.png"
        draw_interference(found.shown, found.pace, setting.output / name)
        pictures.append(
            Picture(
                name,
                f"Every token of {STREAMS} streams: the time since the one before it, while "
                f"{plan.long_prompt:,}-token prompts arrive (dashed). Same cores, same requests. Gaps "
                f"below {TOGETHER_MS:g} ms are drawn there: their tokens reached the client together. "
                "The axis of the gaps is logarithmic.",
            )
        )
    drawn = {rate: arms for rate, arms in found.rates.items() if measured(arms)}
    if drawn and found.slo is not None:
        name = "disagg-rates.png"
        draw_rates(drawn, found.slo, found.capacity, setting.output / name)
        pictures.append(
            Picture(
                name,
                "TTFT, ITL and the share of requests within the SLO against the arrival rate: lines are "
                "medians of the rounds (dashed: p99), dots the rounds, dotted the SLO. The axes of times "
                "are logarithmic, those of rates and shares linear; bars are 95% intervals.",
            )
        )
    if found.handed:
        name = "disagg-handover.png"
        draw_handover(found.handed, setting.output / name)
        caption = (
            "Hand-over of one prompt's KV, as the writer measures it, by transport: medians, fastest to "
            "slowest shaded (both axes logarithmic)."
        )
        pictures.append(Picture(name, caption))
    return pictures
