"""The options of the commands that generate, in sections, as `--help` shows them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from baton.cluster.options import DECLARED, MODEL, PROCESSES, Decorator
from baton.package import COMMAND, spelled

FORMATS = ("txt", "jsonl")
NAMES_OF_FILES = ("output_file", "model", "model_name")


class SectionOption(click.Option):
    """An option with the heading it belongs to."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help groups the options under headings, and names the program as it was started:
    `python main.py` in a checkout, `baton` where it is installed. Its texts are UTF-8."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for each in self.params:
            if each.type is not click.UNPROCESSED and not _is_path(each):
                _check_utf8(ctx, each, ctx.params.get(each.name or ""))
        return rest

    def get_help(self, ctx: click.Context) -> str:
        return spelled(super().get_help(ctx))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                name = option.section if isinstance(option, SectionOption) else "Options"
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records, col_max=34)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


def _is_path(param: click.Parameter) -> bool:
    """Whether it names a file, which on this system may be any bytes."""
    named = isinstance(param, click.Option) and param.metavar in ("FILE", "DIR")
    return named or isinstance(param.type, click.Path) or param.name in NAMES_OF_FILES


def _check_utf8(ctx: click.Context, param: click.Parameter, given: Any) -> None:
    """BadParameter for an argument that is not UTF-8. Python keeps its bytes as halves of surrogate
    pairs, which neither a tokenizer nor a message takes."""
    for text in given if isinstance(given, tuple) else (given,):
        odd = isinstance(text, str) and next(
            (each for each in text if "\udc80" <= each <= "\udcff"), ""
        )
        if odd:
            raise click.BadParameter(
                f"byte 0x{ord(odd) - 0xDC00:02x} of {text[:80]!a} is not UTF-8; set the terminal to "
                "UTF-8, or encode the text in it.",
                ctx,
                param,
            )


class SectionGroup(SectionCommand, click.Group):
    """A group whose help groups the options under headings."""

    command_class = SectionCommand


def option(section: str, *names: str, **kwargs: Any) -> Decorator:
    """click.option under a heading, with its default shown."""
    kwargs.setdefault("show_default", True)
    return click.option(*names, cls=SectionOption, section=section, **kwargs)


def apply(*decorators: Decorator) -> Decorator:
    """Several decorators as one, the first on top."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(decorators):
            function = each(function)
        return function

    return decorate


def job_options() -> Decorator:
    """Input, output and size of the job."""
    job = partial(option, "The job")
    return apply(
        job("-b", "--batch-size", default=4, help="Requests that run at the same time."),
        job("-l", "--generation-length", default=100, help="New tokens for each prompt."),
        job("-o", "--output-file", default="test.txt", help="Where the answers go."),
        job("--prompts", metavar="FILE", show_default="the list in prompts.py",
            help='One prompt per line; or .jsonl with {"prompt": "..."} or "..." per line.'),
        job("--format", type=click.Choice(FORMATS), default="txt",
            help="txt for people, jsonl for programs."),
        job("--timings", is_flag=True, help="Add each request's timings to the jsonl."),
        job("--trace-file", metavar="FILE", show_default="none",
            help="Write the stages of every request for ui.perfetto.dev."),
        job("--quiet", is_flag=True, help="Print errors only."),
    )  # fmt: skip


def sampling_options() -> Decorator:
    """Sampling parameters; the defaults come from the model's generation_config."""
    sampling = partial(option, "Sampling")
    own = partial(sampling, show_default="the model's own")
    return apply(
        own("--temperature", type=float, help="0 is greedy; at most 2."),
        own("--top-k", type=int, help="Keep the k likeliest tokens; 0 = off."),
        own("--top-p", type=float, help="Keep the likeliest tokens that sum to p; 1 = off."),
        own("--min-p", type=float, help="Drop what is less likely than p times the top; 0 = off."),
        own("--repetition-penalty", type=float, help="Above 1 discourages repetition; 1 = off."),
        sampling("--seed", default=0, help="Equal seeds give equal files."),
        sampling("--greedy", is_flag=True, help="Always take the likeliest token."),
        sampling("--stop", multiple=True, metavar="TEXT", show_default="none",
                 help="End an answer before this text; repeatable."),
        sampling("--ignore-eos", is_flag=True, help="Generate -l tokens even after end-of-text."),
    )  # fmt: skip


def target_options() -> Decorator:
    """Where the work is done: model, devices and processes of an own cluster, or a running one."""
    model, processes = partial(option, MODEL), partial(option, PROCESSES)
    running = partial(option, "A running cluster instead")
    devices = []
    for role in ("prefill", "decode"):
        devices += [
            processes(f"--{role}-device", multiple=True, metavar="DEVICE", show_default="auto",
                      help=f"auto, cpu, mps, cuda:0, ... of the {role} workers; repeatable."),
            processes(f"--num-{role}", default=1, help=f"How many {role} workers to start."),
        ]  # fmt: skip
    return apply(
        model("--model", metavar="NAME", default="demo",
              help="A name in configs/model_paths.yaml, a folder, or a Hugging Face id."),
        *(each.click_option(model) for each in DECLARED if each.section == MODEL),
        model("--download", is_flag=True, help="Download a Hugging Face id that is not on disk."),
        *devices,
        processes("--colocated", is_flag=True,
                  help="No prefill workers: decode workers prefill their own KV cache."),
        *(each.click_option(processes) for each in DECLARED if each.section == PROCESSES),
        running("--router", metavar="ADDRESS", show_default="start one",
                help="Send the job to the router at tcp://HOST:PORT or ipc://PATH."),
        running("--keys", metavar="DIR", show_default="none",
                help=f"CURVE keys, needed for tcp://; made by `{COMMAND} keys DIR`."),
    )  # fmt: skip


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where `serve` starts its processes."""
    processes = partial(option, PROCESSES)
    return apply(
        processes("--cluster", type=click.Choice(("local", "ray")), default="local",
                  help="local: on this machine; ray: workers on the nodes of a Ray cluster."),
        processes("--ray-address", metavar="ADDRESS", show_default="that of this machine",
                  help="The Ray cluster, as HOST:PORT of its head."),
    )(command)  # fmt: skip


def print_version(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    """Print the version and exit."""
    if given:
        from baton.package import own_version

        click.echo(f"baton {own_version()}")
        ctx.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_version,
    help="Print the version and exit.",
)
