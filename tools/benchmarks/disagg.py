"""`python main.py bench disagg`: the same requests through prefill/decode, colocated, colocated with
chunked prefill, and prefill/decode whose router decides for each request, on the same cores and with the
same flags.

    mixed     streams decode while long prompts arrive: how long do their tokens wait?
    poisson   requests arrive at random, at several rates: TTFT, ITL, goodput at an SLO
    idle      one long prompt on an idle cluster: what does the hand-over add to its first token?

All clusters run all the time and take turns, round by round; an idle one uses no CPU. Every round of
random requests draws them anew. Figures are medians over rounds, comparisons are medians of the ratios
within rounds. Verdicts on the SLO count the requests of all rounds.
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
from tools.benchmarks.disagg_verdicts import adaptive_verdicts
from tools.benchmarks.keep import save_run, slug
from tools.benchmarks.picture import draw_disagg, save
from tools.measure.slo import Slo, Summary, Trace, percentile, summarise
from tools.measure.split import (
    ADAPTIVE,
    CHUNKED,
    COLOCATED,
    PD,
    RunningArm,
    Setting,
    adaptive_split,
    differences,
    started,
    three_splits,
    use_cores,
)
from tools.measure.workload import Load, mixed, poisson, single

ARMS = (PD, COLOCATED, CHUNKED, ADAPTIVE)
NEAR_TO = ((COLOCATED, "ttft_p50", "TTFT p50"), (PD, "itl_p99", "ITL p99"))
"""What adaptive should come close to, wherever there is slack."""


@dataclass(frozen=True, slots=True)
class Case:
    """A load for each round, and the seconds (from, to) in which gaps count."""

    loads: tuple[Load, ...]
    window: tuple[float, float]

    @property
    def name(self) -> str:
        return self.loads[0].name


def measure(
    arms: list[RunningArm], case: Case, slo: Slo, folder: Path | None = None
) -> dict[str, list[Summary]]:
    """Drive each load through every arm in turn. With a `folder`, each run is recorded there."""
    found: dict[str, list[Summary]] = {arm.split.name: [] for arm in arms}
    for turn, load in enumerate(case.loads, 1):
        for arm in arms:
            traces = arm.drive(load)
            found[arm.split.name].append(summarise(traces, slo, case.window))
            if folder is not None:
                save_run(
                    folder / f"{slug(f'{arm.split.name} {load.name}')}-{turn}.jsonl", arm, traces
                )
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
@click.option("--seconds", type=float, help="Of each Poisson load.  [default: as --requests needs]")
@click.option(
    "--requests", default=60, show_default=True, help="Of each arm and rate, over all rounds."
)
@click.option(
    "--arm", "chosen", multiple=True, type=click.Choice(ARMS), help="Repeatable.  [default: all]"
)
@click.option("--no-mixed", is_flag=True, help="Poisson loads only.")
@click.option(
    "--poisson-prompt", default=256, show_default=True, help="Mean tokens of its prompts."
)
@click.option("--poisson-new", default=32, show_default=True, help="New tokens of its requests.")
@click.option("--chunk", default=256, show_default=True, help="Token budget of the chunked arm.")
@click.option(
    "--prefill-tokens", default=2048, show_default=True, help="Of a step of P/D's prefill."
)
@click.option("--slo-ttft", type=float, default=None, help="Seconds.  [default: 10 x unloaded]")
@click.option(
    "--slo-itl",
    type=float,
    default=None,
    help="Seconds.  [default: 5 x unloaded]  The adaptive arm is told limits that are given here.",
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--only-idle", is_flag=True, help="One long prompt on an idle cluster, nothing else.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for disagg.json and disagg.png.",
)
@click.option(
    "--traces",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder for a file of each run, which `plan --measured` reads.",
)
def main(
    model: str, dtype: str, cores: int | None, streams: int, prompt: int, prompts: int,
    every: float, rates: tuple[float, ...], seconds: float | None, requests: int,
    chosen: tuple[str, ...], no_mixed: bool, poisson_prompt: int, poisson_new: int,
    chunk: int, prefill_tokens: int, slo_ttft: float | None, slo_itl: float | None, rounds: int,
    only_idle: bool, output: Path | None, traces: Path | None,
) -> None:  # fmt: skip
    """P/D against colocated serving, chunked prefill and adaptive roles, on the same cores."""
    if only_idle and output is not None:
        raise InputError("--only-idle writes no results: run without --output")
    cores = cores or usable_cores()
    use_cores(cores)
    limit, told = max(64, streams + prompts), (slo_ttft, slo_itl)
    splits = [*three_splits(prefill_tokens, chunk=chunk), adaptive_split(prefill_tokens)]
    with ExitStack() as stack:
        arms = [
            stack.enter_context(started(split, model=model, dtype=dtype, streams=limit, slo=told))
            for split in splits
            if split.name in (chosen or ARMS)
        ]
        first = arms[0].setting()
        settings = {arm.split.name: arm.setting() for arm in arms}
        if differ := differences(settings):
            raise InputError(f"the arms differ in more than the split: {'; '.join(differ)}")
        if prompt + 8 > first.context:
            raise InputError(
                f"--prompt {prompt} does not fit {model}: its context is {first.context}"
            )
        click.echo(f"{first}")
        idle: dict[str, list[Trace]] = {arm.split.name: [] for arm in arms}
        for arm in arms * (rounds if only_idle or not no_mixed else 1):
            idle[arm.split.name].append(unloaded(arm, prompt, 24))
        click.echo("\n" + idle_lines(idle, prompt))
        if only_idle:
            return
        beside = next((arm for arm in arms if arm.split.colocated), arms[0])
        alone = unloaded(beside, poisson_prompt, poisson_new)
        slo = Slo.of_idle(alone.ttft, percentile(alone.gaps, 50))
        slo = Slo(slo_ttft or slo.ttft_s, slo_itl or slo.itl_s)
        click.echo(f"SLO: first token in {slo.ttft_s:.2f} s, 99 of 100 gaps in {slo.itl_s:.3f} s")
        span = 1.0 + prompts * every
        cases = []
        if not no_mixed:
            stream = int(min(first.context - 20, 60 * span))
            long = mixed(streams=streams, stream_tokens=stream, prompt=prompt, every=every,
                         count=prompts, seed=7)  # fmt: skip
            cases.append(Case((long,) * rounds, (1.0, span)))
        for rate in rates:
            lasts = seconds or requests / rate / rounds
            loads = [poisson(rate, seconds=lasts, prompt=poisson_prompt, new_tokens=poisson_new,
                             seed=11 + 7 * turn, context=first.context)
                     for turn in range(rounds)]  # fmt: skip
            cases.append(Case(tuple(loads), (0.0, float("inf"))))
        results = run_cases(arms, cases, slo, traces)
    if output is not None:
        found = record(first, slo, idle, results)
        save(output, "disagg", found, partial(draw_disagg, results))


def run_cases(
    arms: list[RunningArm], cases: list[Case], slo: Slo, folder: Path | None = None
) -> dict[str, dict[str, list[Summary]]]:
    """Measure and report each case, and all of them at the end."""
    results, told = dict[str, dict[str, list[Summary]]](), list[str]()
    for case in cases:
        adaptive = next((arm for arm in arms if arm.split.name == ADAPTIVE), None)
        before = dict(adaptive.decided) if adaptive is not None else {}
        found = results[case.name] = measure(arms, case, slo, folder)
        click.echo(f"\n{case.name}\n" + figures(found))
        for ours in (PD, ADAPTIVE):
            if ours in found:
                click.echo(compared(found, ours))
        if adaptive is not None and len(set(case.loads)) == len(case.loads):
            decided = {k: n - before.get(k, 0) for k, n in adaptive.decided.items()}
            told += adaptive_verdicts(case.name, found, ADAPTIVE, decided, near=NEAR_TO)
    first = next(iter(results.values()))
    if len({*first} & {PD, COLOCATED, CHUNKED}) == 3 and len(set(cases[0].loads)) == 1:
        told = [*verdicts(results, PD, COLOCATED, CHUNKED), *told]
    click.echo("\n" + "\n".join(told))
    return results


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
