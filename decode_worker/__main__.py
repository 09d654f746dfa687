"""`python -m decode_worker`: the command and nothing else."""

from pathlib import Path
from typing import Any

import click

from baton.cluster.launch import leave_with_one_line, read_worker_options, worker_options
from baton.cluster.options import process_options
from decode_worker.upstream.options import engine_options, read_engine_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@worker_options
@process_options("decode")
@click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The KV pool is made for so many sequences of the longest length, if they fit. Of an engine: "
    "requests at once.",
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
    help="Address of this machine where KV from other hosts is taken in (needs --keys).",
)
@click.option(
    "--beside",
    type=click.IntRange(min=0),
    nargs=2,
    default=(0, 0),
    metavar="PREFILLS DECODES",
    help="Other workers on this GPU. Unless --kv-cache-memory-bytes is given, memory is left for their "
    "weights, and the rest is divided among the pools.",
)
@engine_options
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    """Own the KV pool, and turn filled blocks into tokens, one step at a time.

    Joins the router by itself and stays until it is stopped:

        python -m decode_worker --router ipc:///tmp/baton/router.sock --device cuda:1

    With --engine openai another server computes the tokens (docs/engines.md):

        python -m decode_worker --router ADDRESS --model MODEL --engine openai --upstream http://gpu7:8000
    """

    def work() -> int:
        engine = read_engine_options(context, given)
        options = read_worker_options("decode" if engine is None else "engine", given)
        if engine is not None:
            from decode_worker.upstream.process import run as run_engine

            return run_engine(options, engine)
        from decode_worker.process import run  # torch is loaded from here on

        return run(options, **given)

    leave_with_one_line(work)


if __name__ == "__main__":
    main(prog_name="python -m decode_worker")
