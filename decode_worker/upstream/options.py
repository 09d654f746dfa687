"""The options of an engine worker: `python -m decode_worker --engine openai`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from baton.cluster.options import FiniteRange, flag
from baton.errors import InputError

OWN, OPENAI = "baton", "openai"
KINDS = (
    "auto",
    "vllm",
    "sglang",
    "tensorrt-llm",
    "llama.cpp",
    "baton",
    "other",
    "text",
    "plain-text",
)
"""As in dialects.py, which takes a grammar library to import: `--help` does without."""

COMMON = {
    "router", "model", "name", "keys", "log_level", "parent", "idle", "max_model_len",
    "max_num_seqs", "drain_timeout",
}  # fmt: skip
"""Options of a decode worker that an engine has, too."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """An upstream and how to ask it."""

    upstream: str
    model: str  # its name there; empty: the only one
    kind: str
    key_file: Path | None
    timeout_s: float  # the longest wait for the head of an answer, and then for more data
    max_num_seqs: int  # requests at once


_OPTIONS = [
    click.option("--engine", type=click.Choice([OWN, OPENAI]), default=OWN, show_default=True,
                 help="Who computes: this process, or a server with OpenAI's API."),
    click.option("--upstream", metavar="URL", default=None,
                 help="That server: http://HOST:PORT of vLLM, SGLang, TensorRT-LLM, llama.cpp, ..."),
    click.option("--upstream-kind", type=click.Choice(KINDS), default="auto", show_default=True,
                 help="How to ask it for tokens; auto: by what /v1/models says, and by trying."),
    click.option("--upstream-model", metavar="NAME", default=None,
                 help="The model's name there.  [default: the only one]"),
    click.option("--upstream-key-file", type=click.Path(path_type=Path, dir_okay=False), default=None,
                 help="File with its API key."),
    click.option("--upstream-timeout", type=FiniteRange(1, 86_400), default=120.0, show_default=True,
                 metavar="S", help="An answer of which nothing comes for so long is tried again."),
]  # fmt: skip


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_engine_options(context: click.Context, given: dict[str, Any]) -> EngineOptions | None:
    """Take the engine's options out of `given`; None if this process computes. Raises InputError where
    options of the one are given for the other."""
    source = context.get_parameter_source
    explicit = {name for name in given if source(name) is click.core.ParameterSource.COMMANDLINE}
    engine = {name: given.pop(name) for name in list(given) if name.startswith("upstream")}
    if given.pop("engine") == OWN:
        if mistaken := sorted(explicit & {*engine}):
            raise InputError(f"{flag(mistaken[0])} is for --engine {OPENAI}: add it")
        return None
    if engine["upstream"] is None:
        raise InputError(f"--engine {OPENAI} needs --upstream http://HOST:PORT")
    if mistaken := sorted(explicit - {*engine} - COMMON - {"engine"}):
        raise InputError(
            f"{flag(mistaken[0])} is for a worker that computes by itself: leave it out with "
            f"--engine {OPENAI}"
        )
    return EngineOptions(
        engine["upstream"],
        engine["upstream_model"] or "",
        engine["upstream_kind"],
        engine["upstream_key_file"],
        engine["upstream_timeout"],
        given["max_num_seqs"],
    )
