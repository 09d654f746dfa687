"""`python main.py bench disagg`: the same requests through prefill/decode, colocated, and colocated
with chunked prefill, on the same cores and with the same flags.

    mixed     streams decode while long prompts arrive: how long do their tokens wait?
    poisson   requests arrive at random, at several rates: TTFT, ITL, goodput at an SLO
    idle      one long prompt on an idle cluster: what does the hand-over add to its first token?

All three clusters run all the time and take turns, round by round; an idle one uses no CPU. Figures are
medians over rounds, comparisons are medians of the ratios within rounds.
"""

import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from baton.errors import InputError
from baton.topology import usable_cores
from tools.benchmarks.disagg_report import compared, figures, idle_lines, verdicts
from tools.benchmarks.picture import draw_disagg, save
from tools.measure.slo import Slo, Summary, Trace, percentile, summarise
from tools.measure.split import (
    CHUNKED,
    COLOCATED,
    PD,
    RunningArm,
    Setting,
    differences,
    started,
    three_splits,
    use_cores,
)
from tools.measure.workload import Load, mixed, poisson, single


@dataclass(frozen=True, slots=True)
class Case:
    """A load, and the seconds (from, to) in which gaps count."""

    load: Load
    window: tuple[float, float]


def measure(arms: list[RunningArm], case: Case, slo: Slo, rounds: int) -> dict[str, list[Summary]]:
    """Drive the load through every arm in turn, `rounds` times."""
    found: dict[str, list[Summary]] = {arm.split.name: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            traces = arm.drive(case.load)
            found[arm.split.name].append(summarise(traces, slo, case.window))
    return found


def unloaded(arm: RunningArm, prompt: int, tokens: int) -> Trace:
    """One request alone: the second of two, as the first warms up."""
    return [arm.drive(single(prompt, tokens, seed))[0] for seed in (1, 2)][-1]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="random:gpt2-4k", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--cores", type=int, default=None, help="[default: all]")
@click.option("--streams", default=8, show_default=True, help="Sequences that decode throughout.")
@click.option("--prompt", default=2048, show_default=True, help="Tokens of a long prompt.")
@click.option("--prompts", default=6, show_default=True, help="Long prompts in the mixed load.")
@click.option("--every", default=2.0, show_default=True, help="Seconds between long prompts.")
@click.option(
    "--rate", "rates", multiple=True, type=float, default=(1.0, 2.0, 3.0), show_default=True
)
@click.option("--seconds", default=12.0, show_default=True, help="Of each Poisson load.")
@click.option(
    "--poisson-prompt", default=256, show_default=True, help="Mean tokens of its prompts."
)
@click.option("--poisson-new", default=32, show_default=True, help="New tokens of its requests.")
@click.option("--chunk", default=256, show_default=True, help="Token budget of the chunked arm.")
@click.option(
    "--prefill-tokens", default=2048, show_default=True, help="Of a step of P/D's prefill."
)
@click.option("--slo-ttft", type=float, default=None, help="Seconds.  [default: 10 x unloaded]")
@click.option("--slo-itl", type=float, default=None, help="Seconds.  [default: 5 x unloaded]")
@click.option("--rounds", default=3, show_default=True)
@click.option("--only-idle", is_flag=True, help="One long prompt on an idle cluster, nothing else.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for disagg.json and disagg.png.",
)
def main(
    model: str, dtype: str, cores: int | None, streams: int, prompt: int, prompts: int,
    every: float, rates: tuple[float, ...], seconds: float, poisson_prompt: int, poisson_new: int,
    chunk: int, prefill_tokens: int, slo_ttft: float | None, slo_itl: float | None, rounds: int,
    only_idle: bool, output: Path | None,
) -> None:  # fmt: skip
    """P/D against colocated serving and chunked prefill, on the same cores."""
    if only_idle and output is not None:
        raise InputError("--only-idle writes no results: run without --output")
    cores = cores or usable_cores()
    use_cores(cores)
    limit = max(64, streams + prompts)
    with ExitStack() as stack:
        arms = [
            stack.enter_context(started(split, model=model, dtype=dtype, streams=limit))
            for split in three_splits(prefill_tokens, chunk=chunk)
        ]
        settings = {arm.split.name: arm.setting() for arm in arms}
        if differ := differences(settings):
            raise InputError(f"the arms differ in more than the split: {'; '.join(differ)}")
        context = settings[PD].context
        if prompt + 8 > context:
            raise InputError(f"--prompt {prompt} does not fit {model}: its context is {context}")
        click.echo(f"{settings[PD]}")
        idle: dict[str, list[Trace]] = {arm.split.name: [] for arm in arms}
        for arm in arms * rounds:
            idle[arm.split.name].append(unloaded(arm, prompt, 24))
        click.echo("\n" + idle_lines(idle, prompt))
        if only_idle:
            return
        alone = unloaded(arms[1], poisson_prompt, poisson_new)  # in the colocated cluster
        slo = Slo.of_idle(alone.ttft, percentile(alone.gaps, 50))
        slo = Slo(slo_ttft or slo.ttft_s, slo_itl or slo.itl_s)
        click.echo(f"SLO: first token in {slo.ttft_s:.2f} s, 99 of 100 gaps in {slo.itl_s:.3f} s")
        span = 1.0 + prompts * every
        stream = int(min(context - 20, 60 * span))
        long = mixed(streams=streams, stream_tokens=stream, prompt=prompt, every=every,
                     count=prompts, seed=7)  # fmt: skip
        cases = [Case(long, (1.0, span))]
        for rate in rates:
            load = poisson(rate, seconds=seconds, prompt=poisson_prompt, new_tokens=poisson_new,
                           seed=11, context=context)  # fmt: skip
            cases.append(Case(load, (0.0, float("inf"))))
        results = {}
        for case in cases:
            results[case.load.name] = measure(arms, case, slo, rounds)
            click.echo(f"\n{case.load.name}\n" + figures(results[case.load.name]))
            click.echo(compared(results[case.load.name], PD))
        click.echo("\n" + "\n".join(verdicts(results, PD, COLOCATED, CHUNKED)))
    if output is not None:
        found = record(settings[PD], slo, idle, results)
        save(output, "disagg", found, partial(draw_disagg, results))


def record(
    setting: Setting,
    slo: Slo,
    idle: dict[str, list[Trace]],
    results: dict[str, dict[str, list[Summary]]],
) -> dict[str, Any]:
    """The content of disagg.json."""
    return {
        "setting": asdict(setting),
        "slo": asdict(slo),
        "idle_ttft_s": {n: statistics.median(t.ttft for t in ts) for n, ts in idle.items()},
        "loads": {
            load: {arm: [asdict(each) for each in rounds] for arm, rounds in arms.items()}
            for load, arms in results.items()
        },
    }


if __name__ == "__main__":
    main(prog_name="python main.py bench disagg")
