"""`python main.py infer`: one prompt, greedily, through the same processes as everything else."""

from collections.abc import Iterator

import click

from baton.client.batch import Completion, Failure, Happening, Note, Streamed, Task
from baton.errors import BatonError, InputError
from baton.machine import this_machine
from baton.model_files import resolve_model
from baton.offline.describe import describe_cluster
from baton.offline.fitness import check_length, check_prompts_fit, context_of
from baton.offline.link import link_to
from baton.offline.report import Tally, handed_over, stage_table, startup_line
from baton.offline.settings import Place
from baton.params import GenerationParams
from baton.table import seconds
from baton.timing import Stages
from baton.wire.messages import ClusterInfo
from sampler.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def run_infer(place: Place, prompt: str, generation_length: int, startup: Stages) -> None:
    """Print environment, text and stage times. Raises a BatonError with the one line to print."""
    if not prompt:
        raise InputError("--prompt is empty; it needs at least one character")
    if place.router is None:
        files = resolve_model(place.model, download=place.download)
        context = context_of(files, place.max_model_len)
        check_length(generation_length, context=context, model=files.name)
        check_prompts_fit([prompt], generation_length, files=files, context=context)
    startup.lap("checks")
    click.echo(f"machine   {this_machine()}")
    with link_to(place, batch_size=1, startup=startup) as link:
        _show_cluster(link.follower.await_ready(ours=link.ours), place, startup)
        startup.lap("workers ready")
        ask = GenerationParams(max_new_tokens=generation_length, sampling=GREEDY)
        click.echo(f"\n{prompt}", nl=False)
        done = _streamed(link.follower.run([Task(0, prompt)], ask), startup)
    tally = Tally()
    tally.add(done)
    load_s = startup.total_s("router answered") + startup.total_s("workers ready")
    click.echo("\n\n" + stage_table(tally, load_s=load_s))
    click.echo(f"\n{slower(done)}\n{handed_over(tally)}\n{startup_line(startup)}")


def slower(done: Completion) -> str:
    """Which of prefill and decode takes longer for a token, and tokens a second."""
    times, new = done.timings, len(done.token_ids)
    filled = done.prompt_tokens - 1  # the last prompt token is decode's first step
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


def _show_cluster(happenings: Iterator[Happening], place: Place, startup: Stages) -> None:
    info: ClusterInfo | None = None
    for happening in happenings:
        if isinstance(happening, Note):
            click.echo(happening.text, err=True)
        elif isinstance(happening, ClusterInfo):
            if info is None:
                startup.lap("router answered")
            info = happening
    for line in describe_cluster(info, place.topology) if info else ():
        click.echo(line)


def _streamed(happenings: Iterator[Happening], startup: Stages) -> Completion:
    """Print the text as it comes; the completion at its end."""
    first = True
    for happening in happenings:
        match happening:
            case Streamed(_, _, text):
                if first:
                    startup.lap("first token")
                    first = False
                click.echo(text, nl=False)
            case Note(text):
                click.echo(text, err=True)
            case Failure(_, code, message):
                raise BatonError(f"the request failed ({code}): {message}")
            case Completion():
                return happening
    raise AssertionError("a task ends with a Completion or a Failure")
