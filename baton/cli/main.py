"""The command line, `python main.py` or `baton`. Without a command: the offline job.

A command reads its options and calls the module that does the work. Heavy modules are imported only
then, so that --help and errors in options are fast.
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from baton.cli.options import (
    SectionCommand,
    SectionGroup,
    cluster_options,
    job_options,
    sampling_options,
    target_options,
    version_option,
)
from baton.errors import BatonError, InputError
from baton.host import process_age_s
from baton.offline.interrupts import EXIT_CODE, Interrupted, turned_into_exceptions
from baton.package import COMMAND, IN_CHECKOUT, spelled
from baton.server.options import server_options, settings_from
from baton.timing import Stages

EXAMPLE = """\b
Examples:
  python main.py -b 4 -l 100 -o test.txt
  python main.py --prompts mine.txt --temperature 0.8 --top-p 0.95 --seed 7
  python main.py --router tcp://10.0.0.1:7000 --keys keys --format jsonl -o out.jsonl
"""
BENCHMARKS = ("engine", "disagg", "serve", "chat", "router", "telling", "step", "precision", "handover",
              "gemm", "attention")  # fmt: skip
PASSED_ON = {"ignore_unknown_options": True, "help_option_names": []}
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _alone(process: str, module: str) -> str:
    """The help of a command that starts one process of a cluster."""
    return f"Start {process} alone{f', as `python -m {module}` does' if IN_CHECKOUT else ''}."


max_num_seqs_option = click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that run at once.",
)


@click.group(
    cls=SectionGroup,
    invoke_without_command=True,
    context_settings=HELP,
    subcommand_metavar="[COMMAND]",
    epilog=EXAMPLE,
)
@job_options()
@sampling_options()
@target_options()
@version_option
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    """Continue prompts with a language model: prefill and decode in separate processes.

    Without a command: continue every prompt of prompts.py (or --prompts FILE) and write the answers
    to one file. The file appears when it is complete; run the same command again to resume an
    interrupted run.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_before(ctx)
        return
    from baton.offline.run import run_offline
    from baton.offline.settings import settings_from as job_settings_from

    settings = job_settings_from(given, partial(_is_explicit, ctx))
    run_offline(settings, ctx.ensure_object(Stages))


@cli.command()
@click.option(
    "--prompt",
    default="Explain why batching improves GPU utilization.",
    show_default=True,
    help="What to continue.",
)
@click.option("-l", "--generation-length", default=50, show_default=True, help="New tokens.")
@target_options()
@click.pass_context
def infer(ctx: click.Context, /, prompt: str, generation_length: int, **given: Any) -> None:
    """Continue one prompt with greedy decoding, and show the time of each stage."""
    from baton.cli.infer import run_infer
    from baton.offline.settings import check_numbers, refuse_lora, target_from

    check_numbers(batch_size=1, generation_length=generation_length, stop=())
    refuse_lora(given)
    target = target_from(given, partial(_is_explicit, ctx), batch_size=1)
    run_infer(target, prompt, generation_length, ctx.ensure_object(Stages))


@cli.command()
@click.argument("model_name", metavar="[MODEL]", required=False)
@max_num_seqs_option
@server_options
@target_options()
@cluster_options
@click.pass_context
def serve(
    ctx: click.Context, /, model_name: str | None, max_num_seqs: int, cluster: str,
    ray_address: str | None, **given: Any,
) -> None:  # fmt: skip
    """Serve OpenAI's API, and a page that shows every request, at http://127.0.0.1:8000.

    python main.py serve                             the bundled model

    python main.py serve MODEL --port 8000 --num-prefill 1 --num-decode 1

    python main.py serve MODEL --cluster ray --num-prefill 4 --num-decode 8
    """
    from baton.offline.describe import describe_cluster
    from baton.offline.settings import RunningCluster, options_for_ray, target_from
    from baton.server.serve import run_serve, run_serve_on_ray

    if model_name is not None:
        if _is_explicit(ctx, "model") and given["model"] != model_name:
            raise InputError(f"two models are named, {model_name} and {given['model']}: name one")
        given["model"] = model_name
    is_explicit = partial(_is_explicit, ctx)
    if cluster == "ray":
        options = options_for_ray(given, is_explicit, batch_size=max_num_seqs)
        sys.exit(run_serve_on_ray(options, settings_from(given), describe_cluster, ray_address))
    if ray_address is not None:
        raise InputError("--ray-address is for --cluster ray: add it, or leave out the address")
    target = target_from(given, is_explicit, batch_size=max_num_seqs)
    if isinstance(target, RunningCluster):
        raise InputError(
            "serve starts its own cluster; for a running one use: "
            f"{COMMAND} http --router {target.router}"
        )
    topology = target.options.topology
    settings = settings_from(given)
    sys.exit(run_serve(target.options, settings, lambda info: describe_cluster(info, topology)))


@cli.command()
@click.argument("message", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--api-key", default="", help="Its API key.")
@click.option("--temperature", type=float, default=None, help="0 is greedy.")
@click.option("--max-tokens", type=int, default=None, help="The longest answer, in tokens.")
@click.option("--seed", type=int, default=None, help="Equal seeds give equal answers.")
def chat(message: str | None, url: str, api_key: str, **parameters: Any) -> None:
    """Chat with a running server; with MESSAGE, send that message alone."""
    from baton.cli.chat import run_chat
    from baton.client.http import HttpClient

    given = {name: value for name, value in parameters.items() if value is not None}
    run_chat(HttpClient(url.rstrip("/"), api_key), given, message)


@cli.command("run-batch")
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@max_num_seqs_option
@target_options()
@click.pass_context
def run_batch(
    ctx: click.Context, /, source: Path, out: Path, max_num_seqs: int, **given: Any
) -> None:
    """Answer a file of requests in OpenAI's batch format. Run it again to resume."""
    from baton.offline import run_batch as implementation
    from baton.offline.progress import Progress
    from baton.offline.settings import RunningCluster, refuse_updates, target_from

    refuse_updates(given)
    target = target_from(given, partial(_is_explicit, ctx), batch_size=max_num_seqs)
    if isinstance(target, RunningCluster):
        raise InputError("run-batch starts its own cluster: leave out --router")
    with Progress(quiet=False) as progress:
        implementation.run_batch(target.options, source, out, progress)


@cli.command()
@click.option(
    "--limit",
    default=None,
    metavar="SIZE",
    help="The most it may take from now on, such as 20G; the least recently used goes first.",
)
@click.option("--clear", is_flag=True, help="Delete all of it; the next start makes it again.")
def cache(limit: str | None, clear: bool) -> None:
    """Show what compiled code, compiled models and tokenizers that were made take on disk."""
    from baton.cli.cache import run_cache

    click.echo(run_cache(wanted=limit, clearing=clear))


@cli.command()
def doctor() -> None:
    """Print what a bug report needs: versions, machine, devices, limits, models."""
    from baton.cli.doctor import examine

    click.echo(examine())


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
             hidden=not IN_CHECKOUT)  # fmt: skip
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, options: tuple[str, ...]) -> None:
    """Benchmarks: engine (compared with others), disagg (compared with colocated), and parts of them.

    `python main.py bench NAME --help` lists the options of each.
    """
    _tool(f"tools.benchmarks.{name}", f"bench {name}", options)


def _passed_on(name: str, module: str, help: str, *, tool: bool = False) -> None:
    """A command whose options are read by the click command `main` of `module`."""

    def run(options: tuple[str, ...]) -> None:
        (_tool if tool else _pass_on)(module, name, options)

    unread = click.Argument(["options"], nargs=-1, type=click.UNPROCESSED)
    hidden = tool and not IN_CHECKOUT
    cli.add_command(SectionCommand(name, PASSED_ON, run, [unread], help, hidden=hidden))


_passed_on(
    "lab",
    "tools.lab.__main__",
    "Studies of batching, KV cache and disaggregation on this machine, in one report.",
    tool=True,
)
_passed_on(
    "eval",
    "tools.evaluation.__main__",
    "Evaluate a model: perplexity, BLEU, ROUGE, CORE-style tasks.",
    tool=True,
)
_passed_on(
    "plan",
    "baton.plan.__main__",
    "How many prefill and decode workers a trace needs: a simulation.",
)
_passed_on("router", "router.__main__", _alone("a router", "router"))
_passed_on(
    "prefill-worker", "prefill_worker.__main__", _alone("a prefill worker", "prefill_worker")
)
_passed_on("decode-worker", "decode_worker.__main__", _alone("a decode worker", "decode_worker"))
_passed_on("http", "baton.server.__main__", "Start the HTTP server for a running cluster.")


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def keys(folder: Path) -> None:
    """Create the CURVE keys that tcp:// connections need, in the new folder DIR."""
    from baton.cli.keys import make

    click.echo(make(folder))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokenizer", type=click.Path(path_type=Path), help="If FOLDER has none.")
def convert(folder: Path, out: Path, tokenizer: Path | None) -> None:
    """Convert a checkpoint to safetensors, in the new folder OUT.

    FOLDER is Hugging Face's (config.json, *.bin or *.pt), nanochat's (model_NNNNNN.pt) or LLaMA's
    (consolidated.NN.pth, params.json), or a GGUF file; docs/checkpoints.md says what each must hold.
    """
    from baton.models.convert import convert_folder

    click.echo(convert_folder(folder, out, tokenizer))


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice(["4", "8"]), required=True, help="Of each weight.")
@click.option(
    "--group-size", type=click.IntRange(min=-1), metavar="COLUMNS",
    help="Columns that share a scale; -1: all. Default: 128, or what fits of 64, 32, 16 and 8.",
)  # fmt: skip
def quantize(model: str, out: Path, bits: str, group_size: int | None) -> None:
    """Write MODEL with 4 or 8 bits for each weight, in the new folder OUT.

    Weights are rounded to the nearest, without data, and stored as compressed-tensors (pack-quantized).
    Embeddings, the output and what chooses experts keep their width.
    """
    from baton.models.quantize import quantize_model

    click.echo(quantize_model(model, out, int(bits), group_size))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; an error is printed as one line. Returns the exit code."""
    startup = Stages()
    startup.add("python", process_age_s())
    try:
        with turned_into_exceptions():
            cli.main(arguments, prog_name=COMMAND, standalone_mode=False, obj=startup)
    except click.ClickException as error:
        return _print_error(f"{error.format_message()} See {COMMAND} --help.", error.exit_code)
    except BatonError as error:
        return _print_error(str(error), error.exit_code)
    except Interrupted as interrupt:
        click.echo(f"interrupted: {interrupt}", err=True)
        return EXIT_CODE
    except click.exceptions.Exit as leave:
        return leave.exit_code
    return 0


def _tool(module: str, name: str, options: tuple[str, ...]) -> None:
    """Run a command of tools/. InputError in an installed package, which does not contain it."""
    if not IN_CHECKOUT:
        raise InputError(
            f"`{name}` is part of the source checkout, not of the installed package: "
            f"clone the repository and run `python main.py {name}` there"
        )
    _pass_on(module, name, options)


def _pass_on(module: str, name: str, options: tuple[str, ...]) -> None:
    """Run the click command `main` of a module, which is imported only now."""
    command = import_module(module).main
    for each in (command, *command.params):
        each.help = spelled(each.help or "")
    command.main(list(options), prog_name=f"{COMMAND} {name}", standalone_mode=False)


def _print_error(text: str, exit_code: int) -> int:
    line = " ".join(text.split())
    click.echo(f"error: {line}", err=True)
    return exit_code


def _is_explicit(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _refuse_options_before(ctx: click.Context) -> None:
    for option in ctx.command.params:
        if option.name is not None and _is_explicit(ctx, option.name):
            command = ctx.invoked_subcommand
            raise click.UsageError(
                f"{option.opts[0]} before {command!r} belongs to the job without a command; "
                f"options of {command} come after it."
            )


if __name__ == "__main__":
    sys.exit(main())
