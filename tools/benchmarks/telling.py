"""`python main.py bench telling`: what it costs to send every token at once.

One cluster runs the same job repeatedly. Its tokens are sent at every step, or when the first of them has
waited 20 or 100 ms (stream_interval_s), in turns. Measured: tokens/s, and CPU time of each process per
token.
"""

import os
import random
import secrets
import statistics
import time

import click

from baton.client.batch import Completion, complete
from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.params import GenerationParams
from baton.table import table
from baton.topology import plan_topology
from baton.wire.messages import Submit
from tools.measure.split import GREEDY
from tools.measure.usage import Sampler, Usage
from tools.measure.workload import HIGHEST, LOWEST


def job(client: Client, prompts: list[tuple[int, ...]], options: GenerationParams) -> int:
    """Run the job. Returns the number of generated tokens."""
    name = secrets.token_hex(6)
    submits = {i: Submit(f"{name}-{i}", prompt, options) for i, prompt in enumerate(prompts)}
    events = complete(client, submits, limit=len(prompts))
    return sum(len(each.token_ids) for each in events if isinstance(each, Completion))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="demo", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--new-tokens", default=300, show_default=True)
@click.option("--interval-ms", "intervals", multiple=True, type=float, default=(0.0, 20.0, 100.0))
@click.option("--rounds", default=5, show_default=True)
def main(
    model: str, dtype: str, batch: int, new_tokens: int, intervals: tuple[float, ...], rounds: int
) -> None:
    """What it costs to send every token at once."""
    dice = random.Random(batch)
    prompts = [tuple(dice.randint(LOWEST, HIGHEST) for _ in range(64)) for _ in range(batch)]
    options = ClusterOptions(
        model, plan_topology((), (), gpus=0), batch_size=batch, dtype=dtype, prefix_caching=False
    )
    found: dict[float, list[tuple[float, Usage]]] = {each: [] for each in intervals}
    with Cluster(options) as cluster:
        client = Client(cluster.address, supervise=cluster.check)
        client.await_ready()
        for number in range(rounds + 1):  # the first warms up
            for interval in intervals:
                asking = GenerationParams(
                    new_tokens, GREEDY, ignore_eos=True, stream_interval_s=interval / 1e3
                )
                with Sampler(cluster.pids() | {"client": os.getpid()}) as sampler:
                    begun = time.monotonic()
                    tokens = job(client, prompts, asking)
                    rate = tokens / (time.monotonic() - begun)
                assert sampler.usage is not None
                if number:
                    found[interval].append((rate, sampler.usage))
        client.close()
    names = list(found[intervals[0]][0][1].cores)
    head = ["sent every", "tokens/s", *(f"{name}, us a token" for name in names)]
    click.echo(table(head, [_line(each, turns, names) for each, turns in found.items()]))
    slowest = found[intervals[0]]
    for interval, turns in list(found.items())[1:]:
        ratios = [b[0] / a[0] for a, b in zip(slowest, turns, strict=True)]
        click.echo(f"{interval:g} ms : {intervals[0]:g} ms = {statistics.median(ratios):.2f}")


def _line(interval: float, turns: list[tuple[float, Usage]], names: list[str]) -> list[str]:
    rate = statistics.median(each[0] for each in turns)
    costs = [
        statistics.median(1e6 * usage.cores.get(name, 0.0) / speed for speed, usage in turns)
        for name in names
    ]
    return [
        f"{interval:g} ms" if interval else "step",
        f"{rate:,.0f}",
        *(f"{c:.1f}" for c in costs),
    ]


if __name__ == "__main__":
    main(prog_name="python main.py bench telling")
