"""`python -m prefill_worker`: the command and nothing else."""

from typing import Any

import click

from baton.cluster.launch import leave_with_one_line, read_worker_options, worker_options
from baton.cluster.options import process_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@worker_options
@process_options("prefill")
def main(**given: Any) -> None:
    """Compute the KV cache of prompts, straight into the blocks a decode worker granted.

    Joins the router by itself and stays until it is stopped:

        python -m prefill_worker --router ipc:///tmp/baton/router.sock --device cuda:0
    """

    def work() -> int:
        options = read_worker_options("prefill", given)
        from prefill_worker.process import run  # torch is loaded from here on

        return run(options, **given)

    leave_with_one_line(work)


if __name__ == "__main__":
    main(prog_name="python -m prefill_worker")
