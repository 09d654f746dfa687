"""`python main.py infer`: one prompt with greedy decoding, and the time of each stage."""

import secrets
from collections.abc import Iterator
from contextlib import closing

import click

from baton.client.batch import Completion, Event, Failure, Streamed, complete
from baton.client.blocking import Notice
from baton.errors import BatonError, InputError
from baton.machine import this_machine
from baton.offline.describe import describe_cluster
from baton.offline.length_checks import checked_model
from baton.offline.link import await_cluster, link_to, load_s
from baton.offline.report import Tally, handed_over, stage_table, startup_line
from baton.offline.settings import OwnCluster, Target
from baton.params import GenerationParams
from baton.table import seconds
from baton.timing import Stages
from baton.wire.messages import Submit
from sampler.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def run_infer(target: Target, prompt: str, generation_length: int, startup: Stages) -> None:
    """Print environment, text and stage times. Raises a BatonError."""
    if not prompt:
        raise InputError("--prompt is empty; it needs at least one character")
    topology = None
    if isinstance(target, OwnCluster):
        topology = target.options.topology
        checked_model(target, [prompt], generation_length)
    startup.lap("checks")
    click.echo(f"machine   {this_machine()}")
    with link_to(target, startup=startup) as client:
        info = await_cluster(client, startup, lambda text: click.echo(text, err=True))
        for line in describe_cluster(info, topology):
            click.echo(line)
        click.echo(f"\n{prompt}", nl=False)
        params = GenerationParams(max_new_tokens=generation_length, sampling=GREEDY)
        submit = Submit(f"infer-{secrets.token_hex(6)}", prompt, params)
        with closing(complete(client, {0: submit}, limit=1)) as events:
            done = _streamed(events, startup)
    tally = Tally()
    tally.add(done)
    click.echo("\n\n" + stage_table(tally, load_s=load_s(startup)))
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


def _streamed(events: Iterator[Event], startup: Stages) -> Completion:
    """Print the text while it is generated; returns the completion."""
    for event in events:
        match event:
            case Streamed(_, _, text):
                if not startup.total_s("first token"):
                    startup.lap("first token")
                click.echo(text, nl=False)
            case Notice(text):
                click.echo(text, err=True)
            case Failure(_, code, message):
                raise BatonError(f"the request failed ({code}): {message}")
            case Completion():
                return event
    raise AssertionError("a request ends with a Completion or a Failure")
