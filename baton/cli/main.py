"""The command line, `python main.py` or `baton`. Without a command: the offline job.

Every command here only reads its options and calls the module that does the work; what is heavy is
imported when it is needed, so that --help and a wrong option answer at once.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from baton.cli.options import (
    SectionGroup,
    job_options,
    place_options,
    sampling_options,
    version_option,
)
from baton.errors import BatonError, InputError
from baton.host import process_age_s
from baton.offline.interrupts import EXIT_CODE, Interrupted, turn_into_exceptions
from baton.package import COMMAND, IN_CHECKOUT, spelled
from baton.server.options import server_options, settings_from
from baton.timing import Stages

EXAMPLE = """\b
Examples:
  python main.py -b 4 -l 100 -o test.txt
  python main.py --prompts mine.txt --temperature 0.8 --top-p 0.95 --seed 7
  python main.py --router tcp://10.0.0.1:7000 --keys keys --format jsonl -o out.jsonl
"""
BENCHMARKS = ("engine", "disagg", "serve", "telling", "step", "precision", "handover", "gemm",
              "attention")  # fmt: skip
PASSED_ON = {"ignore_unknown_options": True, "help_option_names": []}
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _alone(process: str, module: str) -> str:
    """The help of a command that starts one process of a cluster."""
    return f"Start {process} alone{f', as `python -m {module}` does' if IN_CHECKOUT else ''}."


@click.group(
    cls=SectionGroup,
    invoke_without_command=True,
    context_settings=HELP,
    subcommand_metavar="[COMMAND]",
    epilog=EXAMPLE,
)
@job_options()
@sampling_options()
@place_options()
@version_option
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    """Continue prompts with a language model: prefill and decode in processes of their own.

    Without a command: continue every prompt of prompts.py (or --prompts FILE) and write the answers
    to one file. The file appears when it is complete; a broken run goes on where it stopped when
    the same command is given again.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_before(ctx)
        return
    from baton.offline.run import run_offline
    from baton.offline.settings import JobSettings, Wish, check_numbers, chosen_prompts, place_from

    check_numbers(
        batch_size=given["batch_size"],
        generation_length=given["generation_length"],
        stop=given["stop"],
    )
    if given["timings"] and given["format"] == "txt":
        raise InputError("--timings go into jsonl lines: add --format jsonl")
    wish = Wish(**{name: given[name] for name in Wish.__dataclass_fields__})
    settings = JobSettings(
        place=place_from(given, lambda name: _said(ctx, name)),
        wish=wish,
        batch_size=given["batch_size"],
        generation_length=given["generation_length"],
        stop=given["stop"],
        ignore_eos=given["ignore_eos"],
        prompts=chosen_prompts(given["prompts"]),
        output=Path(given["output_file"]),
        format=given["format"],
        timings=given["timings"],
        quiet=given["quiet"],
        trace=Path(given["trace_file"]) if given["trace_file"] else None,
    )
    run_offline(settings, ctx.ensure_object(Stages))


@cli.command()
@click.option(
    "--prompt",
    default="Explain why batching improves GPU utilization.",
    show_default=True,
    help="What to continue.",
)
@click.option("-l", "--generation-length", default=50, show_default=True, help="New tokens.")
@place_options()
@click.pass_context
def infer(ctx: click.Context, /, prompt: str, generation_length: int, **given: Any) -> None:
    """One prompt, greedily: the text, and where the time went."""
    from baton.cli.infer import run_infer
    from baton.offline.settings import check_numbers, place_from

    check_numbers(batch_size=1, generation_length=generation_length, stop=())
    place = place_from(given, lambda name: _said(ctx, name))
    run_infer(place, prompt, generation_length, ctx.ensure_object(Stages))


@cli.command()
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that run at once.",
)
@server_options
@place_options()
@click.pass_context
def serve(ctx: click.Context, /, model_name: str | None, max_num_seqs: int, **given: Any) -> None:
    """OpenAI's API and a page that shows every request, at http://127.0.0.1:8000.

    python main.py serve                             the bundled model

    python main.py serve MODEL --port 8000 --num-prefill 1 --num-decode 1
    """
    from baton.offline.describe import describe_cluster
    from baton.offline.link import cluster_options
    from baton.offline.settings import place_from
    from baton.server.serve import run_serve

    if model_name is not None:
        if _said(ctx, "model") and given["model"] != model_name:
            raise InputError(f"two models are named, {model_name} and {given['model']}: name one")
        given["model"] = model_name
    place = place_from(given, lambda name: _said(ctx, name))
    if place.router is not None:
        raise InputError(
            "a server for a running cluster is a command of its own: "
            f"{COMMAND} http --router {place.router}"
        )
    options = cluster_options(place, batch_size=max_num_seqs)
    settings = settings_from(given)
    sys.exit(run_serve(options, settings, lambda info: describe_cluster(info, place.topology)))


@cli.command()
@click.argument("message", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--api-key", default="", help="If it asks for one.")
@click.option("--temperature", type=float, default=None, help="0 is greedy.")
@click.option("--max-tokens", type=int, default=None, help="The most tokens of an answer.")
@click.option("--seed", type=int, default=None, help="Equal seeds give equal answers.")
def chat(message: str | None, url: str, api_key: str, **wanted: Any) -> None:
    """Talk to a running server; with MESSAGE, one message alone."""
    from baton.cli.chat import run_chat
    from baton.client.http import Site

    given = {name: value for name, value in wanted.items() if value is not None}
    run_chat(Site(url.rstrip("/"), api_key), given, message)


@cli.command("run-batch")
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that run at once.",
)
@place_options()
@click.pass_context
def run_batch(
    ctx: click.Context, /, source: Path, out: Path, max_num_seqs: int, **given: Any
) -> None:
    """Answer a file of requests in OpenAI's batch format. Broken off, it goes on where it was."""
    from baton.offline import run_batch as room
    from baton.offline.link import cluster_options
    from baton.offline.progress import Progress
    from baton.offline.settings import place_from

    place = place_from(given, lambda name: _said(ctx, name))
    options = cluster_options(place, batch_size=max_num_seqs)
    with Progress(quiet=False) as progress:
        room.run_batch(options, source, out, progress)


@cli.command()
def doctor() -> None:
    """What a bug report needs: versions, machine, devices, limits, models."""
    from baton.cli.doctor import examine

    click.echo(examine())


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
             hidden=not IN_CHECKOUT)  # fmt: skip
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, options: tuple[str, ...]) -> None:
    """Measure: engine (beside other engines), disagg (beside colocated), and their parts.

    `python main.py bench NAME --help` lists the options of each.
    """
    _tool(f"tools.benchmarks.{name}", f"bench {name}", options)


@cli.command(context_settings=PASSED_ON, hidden=not IN_CHECKOUT)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def lab(options: tuple[str, ...]) -> None:
    """Learn from this machine: studies of batching, KV cache and disaggregation, in one report."""
    _tool("tools.lab.__main__", "lab", options)


@cli.command("eval", context_settings=PASSED_ON, hidden=not IN_CHECKOUT)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def evaluate(options: tuple[str, ...]) -> None:
    """How good a model is: perplexity, BLEU, ROUGE, CORE-style tasks."""
    _tool("tools.evaluation.__main__", "eval", options)


@cli.command(context_settings=PASSED_ON, help=_alone("a router", "router"))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def router(options: tuple[str, ...]) -> None:
    """Its options are read by the process itself."""
    _pass_on("router.__main__", "router", options)


@cli.command(
    "prefill-worker", context_settings=PASSED_ON, help=_alone("a prefill worker", "prefill_worker")
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def prefill_worker(options: tuple[str, ...]) -> None:
    """Its options are read by the process itself."""
    _pass_on("prefill_worker.__main__", "prefill-worker", options)


@cli.command(
    "decode-worker", context_settings=PASSED_ON, help=_alone("a decode worker", "decode_worker")
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def decode_worker(options: tuple[str, ...]) -> None:
    """Its options are read by the process itself."""
    _pass_on("decode_worker.__main__", "decode-worker", options)


@cli.command("http", context_settings=PASSED_ON)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def http(options: tuple[str, ...]) -> None:
    """Start the HTTP server for a running cluster."""
    _pass_on("baton.server.__main__", "http", options)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def keys(folder: Path) -> None:
    """Make the CURVE keys that tcp:// connections need, in the new folder DIR."""
    from baton.cli.keys import make

    click.echo(make(folder))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokenizer", type=click.Path(path_type=Path), help="If FOLDER has none that fits.")
def convert(folder: Path, out: Path, tokenizer: Path | None) -> None:
    """Turn a checkpoint of tensors in pickles into safetensors, in the new folder OUT.

    FOLDER is Hugging Face's (config.json, *.bin or *.pt), nanochat's (model_NNNNNN.pt) or LLaMA's
    (consolidated.NN.pth, params.json); docs/checkpoints.md says what each must hold.
    """
    from baton.models.convert import convert_folder

    click.echo(convert_folder(folder, out, tokenizer))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; one line for whatever goes wrong. Returns the exit code."""
    startup = Stages()
    startup.add("python", process_age_s())
    turn_into_exceptions()
    try:
        cli.main(arguments, prog_name=COMMAND, standalone_mode=False, obj=startup)
    except click.ClickException as error:
        return _told(f"{error.format_message()} See {COMMAND} --help.", error.exit_code)
    except BatonError as error:
        return _told(str(error), error.exit_code)
    except Interrupted as interrupt:
        click.echo(f"interrupted: {interrupt}", err=True)
        return EXIT_CODE
    except click.exceptions.Exit as leave:
        return leave.exit_code
    return 0


def _tool(module: str, name: str, options: tuple[str, ...]) -> None:
    """A command of tools/, which an installed package does not hold. InputError there."""
    if not IN_CHECKOUT:
        raise InputError(
            f"`{name}` is part of the source checkout, not of the installed package: "
            f"clone the repository and run `python main.py {name}` there"
        )
    _pass_on(module, name, options)


def _pass_on(module: str, name: str, options: tuple[str, ...]) -> None:
    """To a room that reads its own options, and is imported only now."""
    room = import_module(module)
    for each in (room.main, *room.main.params):
        each.help = spelled(each.help or "")
    room.main.main(list(options), prog_name=f"{COMMAND} {name}", standalone_mode=False)


def _told(text: str, exit_code: int) -> int:
    line = " ".join(text.split())
    click.echo(f"error: {line}", err=True)
    return exit_code


def _said(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _refuse_options_before(ctx: click.Context) -> None:
    for option in ctx.command.params:
        if option.name is not None and _said(ctx, option.name):
            command = ctx.invoked_subcommand
            raise click.UsageError(
                f"{option.opts[0]} before {command!r} belongs to the job without a command; "
                f"options of {command} stand behind it."
            )


if __name__ == "__main__":
    sys.exit(main())
