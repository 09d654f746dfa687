"""`python main.py bench serve`: the HTTP path against the offline path, on one cluster, in turns.

A closed loop: a fixed number of streams is open until all requests are answered. The HTTP arm reads
server-sent events over persistent connections (streams.py). The offline arm talks to the router, as
`python main.py -b STREAMS` does. Both share the machine with the cluster.
"""

import asyncio
import json
import os
import random
import re
import statistics
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

from baton.client.batch import Completion, Failure, complete
from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.serving import serving_cluster
from baton.cluster.supervisor import Cluster
from baton.params import NOT_STREAMED_S, GenerationParams
from baton.table import percentile, table
from baton.topology import plan_topology
from baton.wire.messages import Submit
from decode_worker.token_buffer import flush_interval
from tools.benchmarks.streams import Answer, Connection
from tools.measure.split import GREEDY
from tools.measure.usage import Sampler, Usage
from tools.measure.workload import HIGHEST, LOWEST

PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the number of tokens of its answer."""

    prompt: tuple[int, ...]
    new: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm's share of one round."""

    tokens_per_s: float
    errors: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    leased_blocks: float  # after all requests have ended
    cores: dict[str, float]  # busy cores by process


class Testbed:
    """A cluster with a server in front of it, asked through HTTP or, offline, through its router."""

    def __init__(self, port: int, cluster: Cluster, client: Client, streams: int) -> None:
        self.port = port
        self.cluster = cluster
        self.client = client
        self.streams = streams
        self.asked = 0

    def leased(self) -> float:
        """KV blocks that requests hold now, from /metrics."""
        address = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(r"^baton:kv_blocks_leased(?:\{.*\})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    async def over_http(self, questions: Sequence[Question], streams: int) -> list[Answer]:
        """Ask all questions over `streams` persistent connections."""
        waiting = iter(questions)
        found: list[Answer] = []

        async def one() -> None:
            connection = Connection()
            for question in waiting:
                asked = self._request(question)
                try:
                    answer = await asyncio.wait_for(connection.ask(self.port, asked), PATIENCE_S)
                except (OSError, ValueError, TimeoutError) as error:
                    connection.close()
                    connection = Connection()
                    answer = Answer(0, 0.0, f"{type(error).__name__}: {error}")
                found.append(answer)
            connection.close()

        await asyncio.gather(*(one() for _ in range(streams)))
        return found

    def _request(self, question: Question) -> bytes:
        asked = {"model": self.cluster.options.model, "prompt": list(question.prompt),
                 "max_tokens": question.new, "temperature": 0, "ignore_eos": True, "stream": True,
                 "stream_options": {"include_usage": True}}  # fmt: skip
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def offline(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask all questions as the offline job does."""
        submits = {}
        for index, each in enumerate(questions):
            options = GenerationParams(
                each.new, GREEDY, ignore_eos=True, stream_interval_s=NOT_STREAMED_S
            )
            submits[index] = Submit(f"bench-{self.asked + index}", each.prompt, options)
        self.asked += len(questions)
        found = []
        for event in complete(self.client, submits, limit=self.streams):
            match event:
                case Completion():
                    first = event.arrivals[0] - event.submitted
                    found.append(Answer(len(event.token_ids), first))
                case Failure():
                    found.append(Answer(0, 0.0, event.message))
        return found


@contextmanager
def testbed(model: str, dtype: str, streams: int, interval_ms: float) -> Iterator[Testbed]:
    """A cluster and a server, ready."""
    options = ClusterOptions(
        model, plan_topology((), (), gpus=0), batch_size=streams, dtype=dtype, prefix_caching=False
    )
    more = ("--stream-interval-ms", f"{interval_ms:g}")
    say = partial(click.echo, err=True)
    with serving_cluster(options, limit=streams, say=say, server=more) as serving:
        yield Testbed(serving.port, serving.cluster, serving.client, streams)


def questions_of(requests: int, prompt_tokens: int, new: int, spread: float) -> list[Question]:
    """Random prompts, the same every time. Answers have `new` tokens, more or less by up to the share
    `spread`."""
    dice = random.Random(1)
    return [
        Question(
            tuple(dice.randint(LOWEST, HIGHEST) for _ in range(prompt_tokens)),
            max(1, round(new * dice.uniform(1 - spread, 1 + spread))),
        )
        for _ in range(requests)
    ]


def turn(bed: Testbed, arm: str, questions: Sequence[Question], streams: int) -> Turn:
    """Run one arm once."""
    with Sampler(bed.cluster.pids() | {"client": os.getpid()}) as sampler:
        begun = time.monotonic()
        work = bed.over_http(questions, streams) if arm == "HTTP" else bed.offline(questions)
        answers = asyncio.run(work)
        seconds = time.monotonic() - begun
    failed = [answer.failure for answer in answers if answer.failure]
    for failure in failed[:3]:
        click.echo(f"{arm}: {failure}", err=True)
    ttfts = sorted(answer.ttft_s for answer in answers if not answer.failure) or [0.0]
    usage = sampler.usage
    assert isinstance(usage, Usage)
    return Turn(
        sum(answer.tokens for answer in answers) / seconds,
        len(failed),
        1e3 * percentile(ttfts, 50),
        1e3 * percentile(ttfts, 99),
        _settled(bed),
        dict(usage.cores),
    )


def _settled(bed: Testbed) -> float:
    """Blocks still held, after up to five seconds: the counts are updated once a second."""
    deadline = time.monotonic() + 5
    while (leased := bed.leased()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return leased


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="demo", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--streams", default=64, show_default=True, help="Open at once.")
@click.option("--requests", default=512, show_default=True, help="Of each turn.")
@click.option("--prompt-tokens", default=16, show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@click.option(
    "--spread",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Answers are longer or shorter by up to this share. With 0, offline requests that start "
    "together also end together.",
)
@click.option("--stream-interval-ms", "interval", default=20.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default=None, help="Folder for serve.json."
)
def main(
    model: str, dtype: str, streams: int, requests: int, prompt_tokens: int, new_tokens: int,
    spread: float, interval: float, rounds: int, output: Path | None,
) -> None:  # fmt: skip
    """The HTTP path against the offline path: tokens/s, errors, TTFT, CPU of each process."""
    questions = questions_of(requests, prompt_tokens, new_tokens, spread)
    arms: dict[str, list[Turn]] = {"HTTP": [], "offline": []}
    with testbed(model, dtype, streams, interval) as bed:
        for arm in arms:
            turn(bed, arm, questions_of(2 * streams, prompt_tokens, 16, 0), streams)  # warms up
        for number in range(rounds):
            for arm in list(arms)[:: -1 if number % 2 else 1]:  # alternate the order
                arms[arm].append(turn(bed, arm, questions, streams))
    lines = [_line(arm, each) for arm, turns in arms.items() for each in turns]
    names = list(arms["HTTP"][0].cores)
    head = ["", "tokens/s", "errors", "TTFT p50, ms", "p99", "blocks held after"]
    click.echo(table([*head, *(f"{name}, cores" for name in names)], lines))
    pairs = zip(arms["HTTP"], arms["offline"], strict=True)
    ratios = [http.tokens_per_s / offline.tokens_per_s for http, offline in pairs]
    click.echo(
        f"HTTP : offline = {statistics.median(ratios):.2f} (median of {len(ratios)} rounds: "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}); tokens are sent within "
        f"{1e3 * flush_interval(interval / 1e3, streams):g} ms over HTTP, "
        f"{1e3 * NOT_STREAMED_S:g} ms offline"
    )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found = {arm: [asdict(each) for each in turns] for arm, turns in arms.items()}
        about = {"model": model, "dtype": dtype, "streams": streams, "requests": requests,
                 "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
                 "spread": spread, "stream_interval_ms": interval}  # fmt: skip
        (output / "serve.json").write_text(json.dumps(about | {"turns": found}, indent=1) + "\n")


def _line(arm: str, each: Turn) -> list[str]:
    shown = [f"{each.tokens_per_s:,.0f}", str(each.errors), f"{each.ttft_p50_ms:,.0f}"]
    shown += [f"{each.ttft_p99_ms:,.0f}", f"{each.leased_blocks:g}"]
    return [arm, *shown, *(f"{cores:.2f}" for cores in each.cores.values())]


if __name__ == "__main__":
    main(prog_name="python main.py bench serve")
