"""`python -m tools.faults`: the reliability battery; exits with 1 if a row fails its pass line.

python -m tools.faults                              everything; writes docs/faults.md, README
python -m tools.faults --seed 7 --only F2           one row, replayed
python -m tools.faults --scale 0.1                  a tenth of everything
python -m tools.faults --resume                     only what has not passed yet
python -m tools.faults soak --minutes 60            load and a random fault a minute
"""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import click

from tools.faults import (
    report,
    rows_hang,
    rows_hostile,
    rows_job,
    rows_kill,
    rows_kv,
    rows_leave,
    rows_links,
    rows_load,
    rows_loop,
    rows_slow,
    rows_start,
    soak,
)  # fmt: skip
from tools.faults.battery import UNJUDGED, Battery, Result
from tools.faults.calm import Moment, why_not_calm
from tools.faults.service import ROOT

Row = Callable[[Battery], list[Result]]
ROWS: Mapping[str, Row] = {
    "F1": rows_kill.f1,
    "F2": rows_kill.f2,
    "F3": rows_kill.f3,
    "F4": rows_kill.f4,
    "F5": rows_hang.f5,
    "F5-late": rows_hang.f5_late,
    "F6": rows_loop.f6,
    "F7": rows_kv.f7,
    "F9": rows_kv.f9,
    "F17": rows_kv.f17,
    "F10": rows_job.f10,
    "F11": rows_job.f11,
    "F12": rows_slow.f12,
    "F14": rows_start.f14,
    "F15": rows_start.f15,
    "F20": rows_links.f20,
    "F21": rows_slow.f21,
    "F22": rows_links.f22,
    "B4": rows_slow.b4,
    "B6": rows_hostile.b6,
    "L2": rows_load.l2,
    "L6": rows_job.l6,
    "B1": rows_hostile.b1,
    "F13": rows_leave.f13,
    "F16": rows_kv.f16,
    "L1": rows_load.l1,
    "L4": rows_load.l4,
    "L7": rows_load.l7,
}
SHARING = {"B1", "F13", "F16", "L1", "L4", "L7"}
"""Rows with one service, so they stand together."""
FOLDER = ROOT / "build" / "faults"


def run_rows(
    battery: Battery,
    rows: Mapping[str, Row],
    before: Sequence[Result] = (),
    keep: Callable[[list[Result]], object] = lambda results: None,
) -> list[Result]:
    """The results of these rows. An error within a row is a problem of that row; the others go on.
    `before`: results of rows that need not be run again. `keep` gets all there are after each row."""
    results: list[Result] = []
    for name, row in rows.items():
        if earlier := [each for each in before if called(each.row) == name]:
            results += earlier
            continue
        if name not in SHARING:
            end_shared(battery, results)
        began = Moment.now()
        try:
            found = row(battery)
        except Exception as error:
            last = traceback.format_exc(limit=-3)
            found = [Result(name, (row.__doc__ or name).splitlines()[0])]
            found[0].problems.append(f"the row ended with {error!r}: {last}")
        ended = Moment.now()
        why = why_not_calm(began, ended, lenient=battery.lenient)
        for each in found:
            each.seconds = (ended.at - began.at) / len(found)
            each.settle(why)
            tell(battery, each)
        results += found
        keep(results)
    end_shared(battery, results)
    return results


def called(row: str) -> str:
    """The row of --only whose result this is: F5 has F5-hang, F5-router, ..."""
    return row if row in ROWS else row.partition("-")[0]


def end_shared(battery: Battery, results: list[Result]) -> None:
    """End the service that rows share; what it leaves behind is a problem of the last of them."""
    if left := battery.end_shared():
        results[-1].problems += left
        tell(battery, results[-1])


def tell(battery: Battery, result: Result) -> None:
    """A row's line for the terminal, and why it failed."""
    battery.say(
        f"{'pass' if result.passed else 'FAIL'}  {result.row:12} {result.seconds:4.0f} s  "
        f"{result.injected} injected, {result.requests} requests, {result.lost} lost, "
        f"{result.wrong} wrong, {result.leaked} blocks leaked"
    )
    for problem in result.problems:
        battery.say(f"      {' '.join(problem.split())[:500]}")
    for note in result.notes:
        if note.startswith(UNJUDGED):
            battery.say(f"      {note}")


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the battery as Ctrl-C does, so that services are stopped."""
    raise KeyboardInterrupt


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, default=1, show_default=True, help="Of workloads and moments.")
@click.option(
    "--scale", type=click.FloatRange(0.001, 100), default=1.0, show_default=True,
    help="Factor on requests and faults.",
)  # fmt: skip
@click.option(
    "--only", multiple=True, type=click.Choice(list(ROWS)), help="Only this row; repeatable."
)
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=FOLDER,
    help="For ledgers and results.json.  [default: build/faults]",
)  # fmt: skip
@click.option(
    "--idle", type=click.FloatRange(0, 86_400), default=20.0, show_default=True, metavar="SECONDS",
    help="So long L7 waits before its requests. 1800: what an idle service has to bear.",
)  # fmt: skip
@click.option(
    "--lenient-times", is_flag=True,
    help="Times beyond their bar are notes; by default only where others use the machine too.",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True,
    help="Keep the rows that passed, by the folder's results.json, and run the others.",
)  # fmt: skip
@click.option("--write", is_flag=True, help="Rewrite docs/faults.md and the README's table anyway.")
@click.pass_context
def main(
    context: click.Context,
    seed: int,
    scale: float,
    only: Sequence[str],
    folder: Path,
    idle: float,
    lenient_times: bool,
    resume: bool,
    write: bool,
) -> None:
    """Inject faults into a real service under load and check every answer.

    With every row at full scale, docs/faults.md and the README's table are rewritten.
    """
    signal.signal(signal.SIGTERM, interrupted)
    folder.mkdir(parents=True, exist_ok=True)
    battery = Battery(seed, scale, folder, lambda text: click.echo(text), lenient_times, idle)
    context.obj = battery
    if context.invoked_subcommand is not None:
        return
    began, kept = time.monotonic(), folder / "results.json"

    def how_run() -> report.About:
        return report.about(seed=seed, scale=scale, seconds=time.monotonic() - began, only=only)

    before: list[Result] = []
    if resume:
        try:
            before = report.passed_before(kept.read_text(), how_run(), called)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise click.ClickException(f"--resume: {kept} cannot be taken up: {error}") from error
    battery.say(f"seed {seed}, scale {scale:g}, ledgers in {folder}")
    battery.make_reference()
    wanted = {name: ROWS[name] for name in only or ROWS}
    results = run_rows(
        battery, wanted, before, lambda found: kept.write_text(report.as_json(found, how_run()))
    )
    how = how_run()
    kept.write_text(report.as_json(results, how))
    (folder / "faults.md").write_text(report.document(results, how))
    if write or (not only and scale >= 1):
        report.write(results, how)
    failed = [each.row for each in results if not each.passed]
    battery.say(
        f"{len(results) - len(failed)} of {len(results)} rows passed in {how.seconds / 60:.1f} minutes"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    sys.exit(1 if failed else 0)


@main.command("soak")
@click.option(
    "--minutes", type=click.FloatRange(0.5), default=60.0, show_default=True, help="How long."
)
@click.pass_obj
def soak_(battery: Battery, minutes: float) -> None:
    """Load at 70 % of the capacity with a random fault a minute; writes docs/soak.md."""
    began = Moment.now()
    battery.make_reference()
    result, lines = soak.run(battery, minutes)
    ended = Moment.now()
    result.seconds = ended.at - began.at
    result.settle(why_not_calm(began, ended, lenient=battery.lenient))
    tell(battery, result)
    how = report.about(
        seed=battery.seed, scale=battery.scale, seconds=result.seconds, only=(),
        command=f"python -m tools.faults --seed {battery.seed} soak --minutes {minutes:g}",
    )  # fmt: skip
    text = report.soaked(result, lines, how)
    (battery.folder / "soak.md").write_text(text)
    if minutes >= 60:
        (ROOT / "docs" / "soak.md").write_text(text)
    sys.exit(0 if result.passed else 1)


if __name__ == "__main__":
    main(prog_name="python -m tools.faults")
