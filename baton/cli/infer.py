"""`python main.py infer`: one prompt with greedy decoding, and the time of each stage."""

from collections.abc import Iterator

import click

from baton.client.batch import (
    Completion,
    Event,
    Failure,
    Notice,
    Streamed,
    Task,
)
from baton.errors import BatonError, InputError
from baton.machine import this_machine
from baton.model_files import resolve_model
from baton.offline.describe import describe_cluster
from baton.offline.length_checks import check_length, check_prompts_fit, context_of
from baton.offline.link import link_to
from baton.offline.report import Tally, handed_over, stage_table, startup_line
from baton.offline.settings import OwnCluster, Target
from baton.params import GenerationParams
from baton.table import seconds
from baton.timing import Stages
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from sampler.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def run_infer(target: Target, prompt: str, generation_length: int, startup: Stages) -> None:
    """Print environment, text and stage times. Raises a BatonError."""
    if not prompt:
        raise InputError("--prompt is empty; it needs at least one character")
    topology = None
    if isinstance(target, OwnCluster):
        topology = target.options.topology
        files = resolve_model(target.options.model, download=target.download)
        context = context_of(files, target.options.max_model_len)
        check_length(generation_length, context=context, model=files.name)
        check_prompts_fit([prompt], generation_length, files=files, context=context)
    startup.lap("checks")
    click.echo(f"machine   {this_machine()}")
    with link_to(target, batch_size=1, startup=startup) as link:
        _show_cluster(link.batch.await_ready(), topology, startup)
        startup.lap("workers ready")
        options = GenerationParams(max_new_tokens=generation_length, sampling=GREEDY)
        click.echo(f"\n{prompt}", nl=False)
        done = _streamed(link.batch.run([Task(0, prompt)], options), startup)
    tally = Tally()
    tally.add(done)
    load_s = startup.total_s("router answered") + startup.total_s("workers ready")
    click.echo("\n\n" + stage_table(tally, load_s=load_s))
    click.echo(f"\n{slower(done)}\n{handed_over(tally)}\n{startup_line(startup)}")


def slower(done: Completion) -> str:
    """Which of prefill and decode takes longer per token, and the tokens per second."""
    times, new = done.timings, len(done.token_ids)
    filled = done.prompt_tokens - 1  # decode computes the last prompt token
    speed = f"{new / max(times.decode_s, 1e-9):,.1f} tokens/s"
    decode = times.decode_s / max(new, 1)
    if not filled or not times.prefill_s:
        return (
            f"decode: {seconds(decode)} a token, {speed}; it filled the prompt's KV cache itself, "
            "so there is no prefill to compare"
        )
    prefill = (times.prefill_s + times.handover_s) / filled
    name, ratio = (
        ("decode", decode / prefill) if decode >= prefill else ("prefill", prefill / decode)
    )
    return (
        f"{name} is slower for a token, {ratio:.1f} times: prefill {seconds(prefill)} "
        f"({filled} tokens at once), decode {seconds(decode)} ({new} tokens, one by one); {speed}"
    )


def _show_cluster(events: Iterator[Event], topology: Topology | None, startup: Stages) -> None:
    info: ClusterInfo | None = None
    for event in events:
        if isinstance(event, Notice):
            click.echo(event.text, err=True)
        elif isinstance(event, ClusterInfo):
            if info is None:
                startup.lap("router answered")
            info = event
    for line in describe_cluster(info, topology) if info else ():
        click.echo(line)


def _streamed(events: Iterator[Event], startup: Stages) -> Completion:
    """Print the text while it is generated; returns the completion."""
    first = True
    for event in events:
        match event:
            case Streamed(_, _, text):
                if first:
                    startup.lap("first token")
                    first = False
                click.echo(text, nl=False)
            case Notice(text):
                click.echo(text, err=True)
            case Failure(_, code, message):
                raise BatonError(f"the request failed ({code}): {message}")
            case Completion():
                return event
    raise AssertionError("a task ends with a Completion or a Failure")
