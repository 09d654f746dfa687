"""`python main.py lab`: reads the options, runs the studies, writes the report. No torch here."""

import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click

from baton.dtypes import DTYPES
from baton.errors import BatonError
from baton.model_files import resolve_model
from baton.package import ROOT
from tools.lab.options import (
    LARGEST_BATCH,
    LARGEST_RATE,
    LONGEST_WINDOW_MS,
    READERS,
    decimals,
    refuse_too_long,
    refuse_unread,
    whole_numbers,
)
from tools.lab.parent import make_folder, run_study, write_report
from tools.lab.questions import EXPECTATIONS, QUESTIONS
from tools.lab.show import REPORT, show
from tools.lab.study import (
    DEFAULT_MODEL,
    NEW_TOKENS,
    QUICK_MODEL,
    QUICK_TOKENS,
    STUDIES,
    Setting,
    model_of,
)

OUTPUT = Path("lab/report")
PROGRAM = "python main.py lab"
LONGEST_PROMPT = 1 << 20


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("studies", nargs=-1, type=click.Choice(STUDIES), metavar="[STUDY]...")
@click.option("--model", help=f"A name of configs/model_paths.yaml, a folder, an id or a shape with "
              f"random weights.  [default: {DEFAULT_MODEL}; of --quick: {QUICK_MODEL}]")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
              help="auto: bfloat16 on a GPU, float32 on a CPU.")  # fmt: skip
@click.option("--batch-sizes", help="batching: comma list.  [default: 1,4,8,16]")
@click.option("--windows-ms", help="batching: comma list.  [default: 0,10,50]")
@click.option("--prompt-lengths", help="kv-cache, disagg: comma list of tokens.  "
              "[default of kv-cache: 64,128,256,512,1024]")  # fmt: skip
@click.option("--rates", help="disagg: comma list of requests/s.")
@click.option("--rounds", type=click.IntRange(1, 100), default=None,
              help="Repeats of every measurement.  [default: depends on the study]")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of prompts and arrivals.")
@click.option("--quick", is_flag=True, help="Small numbers: all studies in less than two minutes.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=OUTPUT,
              show_default=True, help="Folder of the report.")  # fmt: skip
@click.option("--open", "open_", is_flag=True,
              help="Show the report in a browser, on this machine alone, until Ctrl-C. Without a STUDY "
              "a report that is there already is shown, and nothing is measured.")  # fmt: skip
@click.pass_context
def main(
    ctx: click.Context, /, studies: tuple[str, ...], model: str | None, dtype: str,
    batch_sizes: str | None, windows_ms: str | None, prompt_lengths: str | None,
    rates: str | None, rounds: int | None, seed: int, quick: bool, output: Path,
    open_: bool,
) -> None:  # fmt: skip
    """Measure this machine: where a request's time goes, what batching gains and costs, when the KV
    cache pays, which claimed speed-ups hold, when splitting prefill from decode pays.

    Without a STUDY all run: about 25 minutes on two cores. The report is README.md in
    --output. Running a study again replaces its own part of the report only.

    \b
    Studies: baseline, batching, kv-cache, claims, disagg
      python main.py lab
      python main.py lab batching --model random:gpt2 --batch-sizes 1,4,8,16
      python main.py lab kv-cache --prompt-lengths 64,256,1024,2048
      python main.py lab --quick --open
    """
    if open_ and set(_typed(ctx)) <= {"open_", "output"} and (output / REPORT).is_file():
        show(output)
        return
    chosen = [name for name in STUDIES if name in studies] or list(STUDIES)
    setting = Setting(
        output=output.resolve(),
        model=model,
        dtype=dtype,
        quick=quick,
        seed=seed,
        batch_sizes=_whole(batch_sizes, "--batch-sizes", LARGEST_BATCH),
        windows_ms=_decimal(windows_ms, "--windows-ms", 0.0, LONGEST_WINDOW_MS),
        prompt_lengths=_whole(prompt_lengths, "--prompt-lengths", LONGEST_PROMPT, low=2),
        rates=_decimal(rates, "--rates", 0.001, LARGEST_RATE),
        rounds=rounds,
    )
    typed = _typed(ctx)
    refuse_unread({name: option for name, option in typed.items() if name in READERS}, chosen)
    files = resolve_model(model_of(model, quick=quick))
    if "kv-cache" in chosen:
        new = QUICK_TOKENS if quick else NEW_TOKENS
        refuse_too_long(setting.prompt_lengths, new_tokens=new, context=files.max_positions,
                        model=files.name)  # fmt: skip
    if model is not None and files.folder == Path(model).resolve():
        setting = replace(
            setting, model=str(files.folder)
        )  # absolute: the studies run in the project's folder
    make_folder(setting.output)
    commands = {name: PROGRAM + " " + shlex.join([name, *_options(ctx, name)]) for name in chosen}
    _run(commands, setting)
    if open_:
        show(setting.output)


def _run(commands: Mapping[str, str], setting: Setting) -> None:
    """Run every study. The report is written after each, and also after an interrupt."""
    failed = []
    try:
        for number, (name, command) in enumerate(commands.items(), 1):
            click.echo(f"\n=== {name} ({number} of {len(commands)}): {QUESTIONS[name]}")
            click.echo(EXPECTATIONS[name])
            why = run_study(name, setting, command)
            if why:
                failed.append(f"{name} ({why})")
                click.echo(f"{name} failed: {why}")
            else:
                _print_findings(setting.output, name)
    finally:
        path, _ = write_report(setting.output)
        click.echo(f"\nreport    {_short(path)}")
    if failed:
        raise BatonError(f"{len(failed)} of {len(commands)} studies failed: {'; '.join(failed)}")


def _print_findings(folder: Path, name: str) -> None:
    """Print the findings of a study as soon as it is done."""
    _, saved = write_report(folder)
    for each in saved:
        if each.study.name == name:
            for finding in each.study.findings:
                click.echo(f"* {finding}")


def _whole(text: str | None, option: str, high: int, low: int = 1) -> tuple[int, ...]:
    return () if text is None else whole_numbers(text, option, low=low, high=high)


def _decimal(text: str | None, option: str, low: float, high: float) -> tuple[float, ...]:
    return () if text is None else decimals(text, option, low=low, high=high)


def _typed(ctx: click.Context) -> dict[str, str]:
    """The options given on the command line, by the name of their field."""
    source = click.core.ParameterSource.COMMANDLINE
    return {
        str(each.name): each.opts[0]
        for each in ctx.command.params
        if each.name is not None and ctx.get_parameter_source(each.name) is source
    }


def _options(ctx: click.Context, study: str) -> list[str]:
    """The options as typed, without those that this study would refuse."""
    words: list[str] = []
    for name, option in _typed(ctx).items():
        value = ctx.params[name]
        if option.startswith("--") and name != "open_" and study in READERS.get(name, STUDIES):
            words += [option] if value is True else [option, str(value)]
    return words


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(prog_name="python -m tools.lab", standalone_mode=False)
    except BatonError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
