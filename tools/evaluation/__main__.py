"""The command `python main.py eval`: reads the options, evaluates, prints tables and writes JSON.

Torch is imported after the options have been checked, and not at all with --url.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from baton.dtypes import DTYPES, KV_DTYPES
from baton.errors import InputError
from baton.model_files import ModelFiles, resolve_model
from baton.text import Tokenizer
from tools.evaluation import data, report
from tools.evaluation.bundle import read_bundle
from tools.evaluation.data import read_lines, read_pairs, read_text
from tools.evaluation.run import Evaluation
from tools.evaluation.server import ServerSubject
from tools.evaluation.subject import Subject

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
NEW_TOKENS = 128
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)

_SUBJECT = [
    click.option("--model", default=data.BUNDLED_MODEL, show_default=True,
                 help="A name of configs/model_paths.yaml, a folder, or a Hugging Face id."),
    click.option("--download", is_flag=True, help="Fetch it from Hugging Face if it is not on disk."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda:0, mps, ..."),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
                 help="int8 is for the CPU."),
    click.option("--kv-cache-dtype", type=click.Choice(KV_DTYPES), default="auto", show_default=True,
                 help="int8 is for the CPU."),
    click.option("--threads", type=click.IntRange(min=1), default=None,
                 help="CPU threads.  [default: all cores]"),
    click.option("--url", default=None, metavar="URL",
                 help="Use the server there, which serves --model, instead of loading the model."),
    click.option("--served-model", default=None, metavar="NAME",
                 help="The model's name on that server.  [default: the only one]"),
    click.option("--api-key", default="", help="The server's API key, if it needs one."),
]  # fmt: skip
IN_PROCESS = ("device", "dtype", "kv_cache_dtype", "threads")
THROUGH_A_SERVER = ("served_model", "api_key")


def subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name the model and how to run it."""
    for option in reversed(_SUBJECT):
        command = option(command)
    return command


def json_option(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--json."""
    return click.option("--json", "json_file", type=FILE, default=default, show_default=True,
                        help="File for all numbers.")  # fmt: skip


@click.group(invoke_without_command=True, context_settings=HELP, subcommand_metavar="[COMMAND]")
@subject_options
@json_option("eval.json")
@click.pass_context
def main(ctx: click.Context, /, json_file: Path | None, **subject: Any) -> None:
    """Evaluate a model: perplexity, BLEU and ROUGE, CORE-style tasks, and the speed of each.

    Without a command: all of them on bundled data, with a table of each and every number in eval.json.
    The data match what the bundled model was trained on, and say little about another model.

    \b
    python main.py eval
    python main.py eval perplexity --model FOLDER --text book.txt --window 1024 --stride 512
    python main.py eval generation --model FOLDER --data pairs.jsonl
    python main.py eval core --model FOLDER --bundle eval_bundle --max-per-task 100
    python main.py eval core --model FOLDER --url http://127.0.0.1:8000
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_before(ctx)
        return
    run = _evaluation(ctx, subject)
    run.perplexity("held-out documents", data.held_out_texts(), window=None, stride=None, end=True)
    run.generation("held-out documents", data.held_out_pairs(), new_tokens=NEW_TOKENS)
    run.core("bundled", read_bundle(data.BUNDLE), bos=False)
    run.save(json_file)


@main.command()
@click.option("--text", "file", type=FILE, default=None,
              help="A UTF-8 file is one text; of a .jsonl each {\"text\": ...} line is one.  "
              "[default: held-out documents of the bundled corpus]")  # fmt: skip
@click.option("--window", type=click.IntRange(min=1), default=None,
              help="Tokens the model reads at once.  [default: 1024, or the context - 2]")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), default=None,
              help="Tokens that each later window scores.  [default: half a window]")  # fmt: skip
@click.option("--end-token/--no-end-token", default=None,
              help="Score the model's end token after each text.  [default: with bundled texts]"
              )  # fmt: skip
@subject_options
@json_option(None)
@click.pass_context
def perplexity(
    ctx: click.Context,
    /,
    file: Path | None,
    window: int | None,
    stride: int | None,
    end_token: bool | None,
    json_file: Path | None,
    **subject: Any,
) -> None:
    """Perplexity of texts by a sliding window: every token but the first is scored exactly once."""
    name, texts = _texts(file)
    end = file is None if end_token is None else end_token
    run = _evaluation(ctx, subject)
    run.perplexity(name, texts, window=window, stride=stride, end=end)
    run.save(json_file)


@main.command()
@click.option("--data", "file", type=FILE, default=None,
              help="JSON lines: {\"prompt\": ..., \"reference\": ...}; or references, a list.  "
              "[default: halves of held-out documents]")  # fmt: skip
@click.option("--max-new-tokens", "new_tokens", type=click.IntRange(min=1), default=NEW_TOKENS,
              show_default=True, help="Most tokens of a continuation.")  # fmt: skip
@subject_options
@json_option(None)
@click.pass_context
def generation(
    ctx: click.Context,
    /,
    file: Path | None,
    new_tokens: int,
    json_file: Path | None,
    **subject: Any,
) -> None:
    """Greedy continuations against references: corpus BLEU (sacrebleu), ROUGE-1, -2 and -L (F1)."""
    name = "held-out documents" if file is None else str(file)
    pairs = data.held_out_pairs() if file is None else read_pairs(file)
    run = _evaluation(ctx, subject)
    run.generation(name, pairs, new_tokens=new_tokens)
    run.save(json_file)


@main.command()
@click.option("--bundle", "folder", type=FOLDER, default=None,
              help="Tasks in the format of nanochat's eval_bundle.  [default: a small one, bundled]"
              )  # fmt: skip
@click.option(
    "--max-per-task",
    type=click.IntRange(min=1),
    default=None,
    help="Most examples of a task, for a first look.",
)
@click.option("--bos", is_flag=True,
              help="Begin every text with the model's bos_token_id, as nanochat does, even if the "
              "tokenizer does not.")  # fmt: skip
@subject_options
@json_option(None)
@click.pass_context
def core(
    ctx: click.Context,
    /,
    folder: Path | None,
    max_per_task: int | None,
    bos: bool,
    json_file: Path | None,
    **subject: Any,
) -> None:
    """CORE-style tasks: multiple choice, schema, language modeling; centered accuracies."""
    name = "bundled" if folder is None else str(folder)
    tasks = read_bundle(folder or data.BUNDLE, max_per_task=max_per_task)
    run = _evaluation(ctx, subject)
    run.core(name, tasks, bos=bos)
    run.save(json_file)


def _texts(file: Path | None) -> tuple[str, list[str]]:
    """Their name, and the texts."""
    if file is None:
        return "held-out documents", data.held_out_texts()
    if file.suffix == ".jsonl":
        return str(file), [line.text("text") for line in read_lines(file)]
    return str(file), [read_text(file)]


def _evaluation(ctx: click.Context, options: Mapping[str, Any]) -> Evaluation:
    """Load the model or connect to the server, and print its headline."""
    idle = THROUGH_A_SERVER if options["url"] is None else IN_PROCESS
    for name in idle:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option, when = name.replace("_", "-"), "without" if options["url"] is None else "with"
            raise InputError(f"--{option} has no effect {when} --url")
    if (file := ctx.params["json_file"]) is not None and not file.absolute().parent.is_dir():
        raise InputError(f"--json {file}: no such folder: {file.absolute().parent}")
    files = resolve_model(options["model"], download=options["download"])
    model = _subject(files, options)
    click.echo(report.headline(model.about))
    settings = {k: _plain(v) for k, v in ctx.params.items() if k != "api_key"}
    command = f"eval {ctx.info_name}" if ctx.parent else "eval"
    return Evaluation(
        model, files, Tokenizer(files.tokenizer_file), {"command": command} | settings
    )


def _subject(files: ModelFiles, options: Mapping[str, Any]) -> Subject:
    if options["url"] is not None:
        url = options["url"].rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url must begin with http:// or https://, got {options['url']!r}")
        return ServerSubject(url, files, served=options["served_model"], api_key=options["api_key"])
    from tools.evaluation.engine import EngineSubject  # torch

    return EngineSubject(
        files,
        device=options["device"],
        dtype=options["dtype"],
        kv_dtype=options["kv_cache_dtype"],
        threads=options["threads"],
    )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _refuse_options_before(ctx: click.Context) -> None:
    for option in ctx.command.params:
        if option.name and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"put {option.opts[0]} after {ctx.invoked_subcommand!r}")


if __name__ == "__main__":
    main(prog_name="python -m tools.evaluation")
