"""The cost and gain of fewer bits: perplexity and speed of each dtype, on this machine's CPU.

    python main.py bench precision --texts 200

Perplexity is that of the bundled model on held-out documents, through the serving engine, measured as
its card says (baton/models/demo/README.md). Speed is that of a decode step of random:gpt2, whose weights
do not fit a cache. The dtypes take turns.
"""

import math
import statistics
from collections.abc import Iterator
from itertools import islice

import click
import torch
from tokenizers import Tokenizer

from baton.engine.boot import Engine, boot
from baton.engine.pool import Pool
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from baton.table import table
from tools.measure.steps import DecodeSteps
from tools.training.demo_corpus import documents
from tools.training.demo_training import HELD_OUT, end_of

DTYPES = ("float32", "bfloat16", "int8", "int8_weight_only")
CONTEXT = 110  # tokens of each sequence when it is timed
BLOCK = 16


def texts(tokenizer: Tokenizer, count: int) -> Iterator[list[int]]:
    """Held-out documents as token ids, each with its end."""
    for text in islice(documents(split=HELD_OUT, seed=0), count):
        yield [*tokenizer.encode(text).ids, end_of(tokenizer)]


def perplexity(engine: Engine, documents: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each document."""
    longest = max(map(len, documents))
    blocks = list(range(engine.layout.blocks_for(longest)))
    pool = Pool.private(engine.layout, len(blocks), engine.device)
    total, count = 0.0, 0
    for ids in documents:
        logits = engine.runner.run(pool, [Row(ids[:-1], 0, blocks, Logits.ALL)])
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[1:]), reduction="sum"
        ).item()
        count += len(ids) - 1
    return math.exp(total / count)


def speeds(model: str, batches: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Median ms of a step for each dtype and batch, dtypes taking turns."""
    files = resolve_model(model)
    engines = {d: boot(files, device="cpu", dtype=d, block_size=BLOCK) for d in DTYPES}
    medians: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for batch in batches:
        arms = {
            dtype: DecodeSteps(each.runner, each.layout, batch=batch, context=CONTEXT)
            for dtype, each in engines.items()
        }
        took: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for _ in range(rounds):
            for dtype, arm in arms.items():
                took[dtype].append(arm.seconds(5))
        for dtype in DTYPES:
            medians[dtype].append(statistics.median(took[dtype]) * 1e3)
    return medians


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--texts", "count", default=200, show_default=True, help="Held-out documents.")
@click.option("--model", default="random:gpt2", show_default=True, help="What is timed.")
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 4, 16, 64))
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", type=int, default=None, help="[default: all cores]")
def main(
    count: int, model: str, batches: tuple[int, ...], rounds: int, threads: int | None
) -> None:
    """Perplexity and speed of float32, bfloat16, int8 and weight-only int8."""
    if threads:
        torch.set_num_threads(threads)
    demo = resolve_model("demo")
    documents_ = list(texts(Tokenizer.from_file(str(demo.tokenizer_file)), count))
    costs = {
        dtype: perplexity(boot(demo, device="cpu", dtype=dtype, block_size=BLOCK), documents_)
        for dtype in DTYPES
    }
    steps = speeds(model, batches, rounds)
    head = ["dtype", "perplexity of demo", *(f"{model}, ms a step at {b}" for b in batches)]
    lines = [
        [dtype, f"{costs[dtype]:.4f}", *(f"{ms:.2f}" for ms in steps[dtype])] for dtype in DTYPES
    ]
    click.echo(table(head, lines))
    tokens = sum(len(ids) - 1 for ids in documents_)
    click.echo(f"{len(documents_)} texts, {tokens:,} tokens; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(prog_name="python main.py bench precision")
