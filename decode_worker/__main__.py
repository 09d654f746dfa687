"""`python -m decode_worker`: the command and nothing else."""

from pathlib import Path
from typing import Any

import click

from baton.cluster.launch import leave_with_one_line, read_worker_options, worker_options
from baton.kv.transports import CHOICES


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@worker_options
@click.option(
    "--kv-transport",
    type=click.Choice(CHOICES),
    default="auto",
    show_default=True,
    help="How the KV pool is offered to prefill workers; auto: in every way this machine has.",
)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The KV pool is made for so many sequences of the longest length, if they fit.",
)
@click.option(
    "--kv-cache-memory-bytes",
    type=click.IntRange(min=1),
    default=None,
    help="The most memory the KV pool may take.  [default: a share of what is free]",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of mode 0700 for this worker's own sockets.  [default: that of an ipc router]",
)
@click.option(
    "--kv-host",
    default=None,
    metavar="ADDRESS",
    help="Address of this machine where KV frames from other hosts are taken in (needs --keys).",
)
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    "prefix_caching",
    default=True,
    show_default=True,
    help="Keep the KV of finished sequences for prompts that begin the same, while there is room.",
)
@click.option(
    "--speculative-model",
    default=None,
    metavar="NAME",
    help="Guess tokens ahead (the answers stay the same): ngram looks in the text so far; a model "
    "of the same vocabulary is run beside the large one.  [default: none]",
)
@click.option(
    "--num-speculative-tokens",
    type=click.IntRange(1, 32),
    default=4,
    show_default=True,
    help="The most guesses a step for one sequence.",
)
def main(**given: Any) -> None:
    """Own the KV pool, and turn filled blocks into tokens, one step at a time.

    Joins the router by itself and stays until it is stopped:

        python -m decode_worker --router ipc:///tmp/baton/router.sock --device cuda:1
    """

    def work() -> int:
        options = read_worker_options("decode", given)
        from decode_worker.process import run  # torch is loaded from here on

        return run(options, **given)

    leave_with_one_line(work)


if __name__ == "__main__":
    main(prog_name="python -m decode_worker")
