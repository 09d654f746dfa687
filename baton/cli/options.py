"""The options of the commands that generate, in sections, as `--help` shows them."""

from collections.abc import Callable
from typing import Any

import click

from baton.dtypes import DTYPES
from baton.kv.transports import CHOICES
from baton.offline.outputs import FORMATS
from baton.package import COMMAND

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class SectionOption(click.Option):
    """An option that knows under which heading it stands."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help has a heading over each section of options, and spells the program the
    way it was started: `python main.py` in a checkout, `baton` where it is installed."""

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("python main.py", COMMAND)

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


class SectionGroup(SectionCommand, click.Group):
    """A group with its options in sections, and its commands behind them."""

    command_class = SectionCommand


def option(section: str, *names: str, **kwargs: Any) -> Decorator:
    """click.option under a heading; the default is shown."""
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
    """What is done, and where it goes."""
    here = "The job"
    return apply(
        option(here, "-b", "--batch-size", default=4, help="Requests that run at once."),
        option(here, "-l", "--generation-length", default=100, help="New tokens for each prompt."),
        option(here, "-o", "--output-file", default="test.txt", help="Where the answers go."),
        option(
            here,
            "--prompts",
            metavar="FILE",
            show_default="the list in prompts.py",
            help='One prompt a line; or .jsonl: {"prompt": "..."} or "..." a line.',
        ),
        option(
            here,
            "--format",
            type=click.Choice(FORMATS),
            default="txt",
            help="txt is for reading, jsonl for programs.",
        ),
        option(here, "--timings", is_flag=True, help="Add each request's timings to the jsonl."),
        option(
            here,
            "--trace-file",
            metavar="FILE",
            show_default="none",
            help="Every request's stages, for ui.perfetto.dev.",
        ),
        option(here, "--quiet", is_flag=True, help="Say nothing but errors."),
    )


def sampling_options() -> Decorator:
    """How tokens are drawn. What is not given here is the model's own generation_config."""
    here, own = "Sampling", "the model's own"
    number: dict[str, Any] = {"type": float, "show_default": own}
    return apply(
        option(here, "--temperature", **number, help="0 is greedy, up to 2."),
        option(here, "--top-k", type=int, show_default=own, help="Among the k likeliest; 0 = off."),
        option(here, "--top-p", **number, help="Among the likeliest that sum to p; 1 = off."),
        option(here, "--min-p", **number, help="At least p times as likely as the top; 0 = off."),
        option(here, "--repetition-penalty", **number, help="Above 1: repeat less; 1 = off."),
        option(here, "--seed", default=0, help="Equal seeds give equal files."),
        option(here, "--greedy", is_flag=True, help="Always the likeliest token."),
        option(
            here,
            "--stop",
            multiple=True,
            metavar="TEXT",
            show_default="none",
            help="End an answer before this text; repeatable.",
        ),
        option(here, "--ignore-eos", is_flag=True, help="Go on to -l tokens whatever comes."),
    )


def place_options() -> Decorator:
    """On what it is done: model, devices, processes, or a running cluster."""
    model, topology, running = "The model", "Processes and devices", "A running cluster instead"
    return apply(
        option(
            model,
            "--model",
            metavar="NAME",
            default="demo",
            help="A name in configs/model_paths.yaml, a folder, or a Hugging Face id.",
        ),
        option(
            model,
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            help="auto: bfloat16 on a GPU, float32 on a CPU.",
        ),
        *_memory(model),
        option(model, "--download", is_flag=True, help="Fetch a Hugging Face id that is not here."),
        *_speculation(model),
        *_devices(topology),
        option(
            topology,
            "--colocated",
            is_flag=True,
            help="No prefill workers: decode fills its own KV cache.",
        ),
        option(
            topology,
            "--kv-transport",
            type=click.Choice(CHOICES),
            default="auto",
            help="How KV gets from prefill to decode; auto takes the fastest that works.",
        ),
        option(
            topology,
            "--batch-window-ms",
            type=float,
            default=10.0,
            help="The longest a prompt waits for others on their way to be filled with; 0 = not at all.",
        ),
        option(
            running,
            "--router",
            metavar="ADDRESS",
            show_default="start one",
            help="Send the job to the router at tcp://HOST:PORT or ipc://PATH.",
        ),
        option(
            running,
            "--keys",
            metavar="DIR",
            show_default="none",
            help=f"CURVE keys, needed for tcp://; made by `{COMMAND} keys DIR`.",
        ),
    )


def _memory(section: str) -> list[Decorator]:
    return [
        option(
            section,
            "--max-model-len",
            type=int,
            metavar="TOKENS",
            show_default="the model's context",
            help="Prompt and answer together; less needs less memory.",
        ),
        option(
            section,
            "--kv-cache-memory-bytes",
            type=int,
            metavar="BYTES",
            show_default="room for -b of the longest, if it fits",
            help="KV pool of a decode worker. Too small for all: the youngest requests give way.",
        ),
    ]


def _speculation(section: str) -> list[Decorator]:
    return [
        option(
            section,
            "--speculative-model",
            metavar="NAME",
            show_default="none",
            help="Guess tokens ahead, same answers: ngram, or a small model of the same tokens.",
        ),
        option(
            section,
            "--num-speculative-tokens",
            default=4,
            help="The most guesses a step.",
        ),
        option(
            section,
            "--enable-prefix-caching/--no-enable-prefix-caching",
            "prefix_caching",
            default=True,
            show_default="on",
            help="Prompts that begin the same share what is computed.",
        ),
    ]


def _devices(section: str) -> list[Decorator]:
    found = []
    for role in ("prefill", "decode"):
        found.append(
            option(
                section,
                f"--{role}-device",
                multiple=True,
                metavar="DEVICE",
                show_default="auto",
                help=f"auto, cpu, mps, cuda:0, ... of the {role} workers; repeatable.",
            )
        )
        found.append(
            option(section, f"--num-{role}", default=1, help=f"How many {role} workers to start.")
        )
    return found


def print_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    """The version, and the way out."""
    if wanted:
        from baton.package import own_version

        click.echo(f"baton {own_version()}")
        ctx.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_version,
    help="Print the version and leave.",
)
