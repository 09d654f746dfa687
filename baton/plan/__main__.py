"""`python main.py plan`: how many prefill and decode workers a trace needs, on a virtual clock."""

from pathlib import Path

import click

from baton.cluster.options import FiniteRange
from baton.errors import InputError
from baton.plan.against import Compared, compared, replayed, verdict
from baton.plan.arrivals import poisson, read_trace
from baton.plan.fit import fit
from baton.plan.frontier import Found, best, divisions, simulated
from baton.plan.machine import Machine
from baton.plan.recorded import Recorded, Setting, arrivals_of, read_recorded
from baton.plan.simulation import Arrival, Shape
from baton.table import table

WORKERS = 4
ABOVE_0 = FiniteRange(0, 1e9, min_open=True)
HEADER = ("P:D, policy", "within SLO", "goodput, 1/s", "TTFT p50, ms", "p99", "ITL p50, ms", "p99",
          "failed")  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="JSONL",
              help="Requests in Mooncake's format.  [default: Poisson arrivals, see --rate]")  # fmt: skip
@click.option("--measured", type=click.Path(path_type=Path, dir_okay=False), default=None,
              metavar="JSONL", help="A run that `bench disagg --traces` has recorded: its requests and "
              "step times. Prints how wrong the simulation of it is.")  # fmt: skip
@click.option("--fit-on", type=click.Path(path_type=Path, dir_okay=False), default=None,
              metavar="JSONL", show_default="the first half of --measured",
              help="Learn the step times from this run.")  # fmt: skip
@click.option(
    "--slo-ttft", type=ABOVE_0, required=True, metavar="S", help="Limit of the first token."
)
@click.option("--slo-itl", type=ABOVE_0, required=True, metavar="S",
              help="Limit of 99 of 100 gaps between tokens.")  # fmt: skip
@click.option("--workers", type=click.IntRange(2, 256), default=None, show_default="4, or as recorded",
              help="Prefill and decode together.")  # fmt: skip
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True,
              help="The first so many of the trace.")  # fmt: skip
@click.option("--speed", type=ABOVE_0, default=1.0, show_default=True,
              help="The trace so many times as fast.")  # fmt: skip
@click.option("--rate", type=ABOVE_0, default=4.0, show_default=True, help="Poisson: requests/s.")
@click.option("--prompt", type=click.IntRange(2, 1 << 16), default=1024, show_default=True,
              help="Poisson: mean tokens of a prompt.")  # fmt: skip
@click.option("--new", type=click.IntRange(1, 1 << 16), default=64, show_default=True,
              help="Poisson: mean tokens of an answer.")  # fmt: skip
@click.option("--forward-ms", type=ABOVE_0, default=8.0, show_default=True,
              help="Of the machine: any forward.")  # fmt: skip
@click.option("--token-ms", type=ABOVE_0, default=0.04, show_default=True,
              help="Each prompt token in it.")  # fmt: skip
@click.option("--stream-ms", type=FiniteRange(0, 1e6), default=0.05, show_default=True,
              help="Each stream in it.")  # fmt: skip
@click.option("--kv-bytes", type=click.IntRange(min=1), default=1 << 16, show_default=True,
              help="KV of one token.")  # fmt: skip
@click.option("--kv-gb-per-s", type=FiniteRange(0, 1e6), default=10.0, show_default=True,
              help="Of a hand-over; 0: memory is shared.")  # fmt: skip
@click.option("--cores", type=click.IntRange(min=0), default=0, show_default=True,
              help="All workers compute on these; 0: each has a device of its own.")  # fmt: skip
@click.option("--pool-tokens", type=click.IntRange(min=1024), default=1 << 18, show_default=True,
              help="KV pool of a decode worker.")  # fmt: skip
def main(
    trace: Path | None, measured: Path | None, fit_on: Path | None, slo_ttft: float, slo_itl: float,
    workers: int | None, requests: int, speed: float, rate: float, prompt: int, new: int,
    forward_ms: float, token_ms: float, stream_ms: float, kv_bytes: int, kv_gb_per_s: float, cores: int,
    pool_tokens: int,
) -> None:  # fmt: skip
    """How many prefill and decode workers these requests need, or no prefill workers at all.

    The router's and the workers' own code runs on a virtual clock; forwards take as long as the options
    of the machine say, or as long as in a recorded run (--measured). `bench gemm` and `bench step`
    measure them; a worker learns them by itself.
    """
    machine = Machine(
        forward_ms / 1000, token_ms / 1000, stream_ms / 1000, cores=cores,
        kv_bytes_per_token=kv_bytes, kv_bytes_per_s=kv_gb_per_s * 1e9,
    )  # fmt: skip
    if fit_on is not None and measured is None:
        raise InputError("--fit-on says what the machine of --measured is learnt from: give both")
    if measured is not None:
        if fit_on is not None and fit_on.resolve() == measured.resolve():
            raise InputError(
                f"--fit-on {fit_on} is --measured: leave it out, and half is kept unseen"
            )
        if trace is not None:
            raise InputError("--trace and --measured both say which requests come: give one")
        setting, recorded = read_recorded(measured, option="--measured")
        arrivals = arrivals_of(recorded)
        _check_pool(arrivals, pool_tokens)
        machine = _learnt(measured, fit_on, (setting, recorded), kv_bytes, pool_tokens)
        workers = workers or max(2, setting.prefills + setting.decodes)
    elif trace is not None:
        arrivals = read_trace(trace, most=requests, speed=speed)
    else:
        arrivals = poisson(rate, requests, prompt=prompt, new_tokens=new)
    _check_pool(arrivals, pool_tokens)
    lasts = arrivals[-1].at
    click.echo(
        f"{len(arrivals):,} requests in {lasts:,.0f} s, {sum(len(a.prompt) for a in arrivals):,} prompt "
        f"tokens, {sum(a.new_tokens for a in arrivals):,} answered; SLO: {1000 * slo_ttft:g} ms, "
        f"{1000 * slo_itl:g} ms\n{machine}\n"
    )
    shape = Shape(pool_tokens=pool_tokens, context=1 << 20)
    found = [
        simulated(division, machine, arrivals, (slo_ttft, slo_itl), shape)
        for division in divisions(workers or WORKERS)
    ]
    click.echo(table(HEADER, [_line(each) for each in found]))
    click.echo(f"\nbest: {best(found).division}")


def _check_pool(arrivals: list[Arrival], pool_tokens: int) -> None:
    longest = max(len(each.prompt) + each.new_tokens for each in arrivals)
    if longest > pool_tokens:
        raise InputError(
            f"a request has {longest:,} tokens and a pool {pool_tokens:,}: raise --pool-tokens"
        )


def _learnt(
    path: Path,
    fit_on: Path | None,
    measured: tuple[Setting, list[Recorded]],
    kv_bytes: int,
    pool_tokens: int,
) -> Machine:
    """The machine of a recorded run, and on the terminal how wrong its simulation is. Without `fit_on`
    the second half of the requests is kept from the fit."""
    setting, recorded = measured
    if fit_on is None:
        known, unseen = recorded[: len(recorded) // 2], recorded[len(recorded) // 2 :]
        machine = fit(known, setting, kv_bytes)
        learnt = f"the first {len(known)} requests of {path}"
    else:
        others, known_all = read_recorded(fit_on, option="--fit-on")
        if others.cores != setting.cores:
            raise InputError(
                f"--fit-on {fit_on} was recorded on {others.cores} shared cores, --measured {path} on "
                f"{setting.cores}: record both on one machine"
            )
        known, unseen = [], recorded
        machine, learnt = fit(known_all, others, kv_bytes), f"{len(known_all)} requests of {fit_on}"
    answers = replayed(recorded, setting, machine, pool_tokens)
    click.echo(f"measured on {setting}; step times learnt from {learnt}\n")
    if known:
        lines = compared(known, answers[: len(known)])
        click.echo(f"{_errors(lines)}\n")
    lines = compared(unseen, answers[len(known) :])
    click.echo(f"{_errors(lines, seen=False)}\n\n{verdict(lines)}\n")
    return machine


def _errors(lines: list[Compared], *, seen: bool = True) -> str:
    title = "what it was fitted on" if seen else "what it has not seen"
    rows = [
        [
            one.name,
            *(f"{1000 * t:,.1f}" for t in (one.measured, one.predicted)),
            f"{one.error:+.1%}",
        ]
        for one in lines
    ]
    return table((title, "measured, ms", "predicted, ms", "error"), rows)


def _line(found: Found) -> list[str]:
    score = found.score
    ms = (score.ttft_p50, score.ttft_p99, score.itl_p50, score.itl_p99)
    return [
        str(found.division), f"{found.share:.1%}", f"{score.goodput:.2f}",
        *(f"{1000 * each:,.1f}" for each in ms), str(score.failed),
    ]  # fmt: skip


if __name__ == "__main__":
    main(prog_name="python main.py plan")
