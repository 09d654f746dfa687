"""`python -m router`: the command and nothing else."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import click

from baton.clock import monotonic
from baton.cluster.launch import leave_with_one_line
from baton.cluster.options import process_options
from baton.cluster.stuck import STUCK_S
from baton.health import Health, HealthServer, parse_address
from baton.host import core_numbers, die_with, host_id
from baton.log import LEVELS, set_up_logging
from baton.model_files import resolve_model
from baton.package import COMMAND
from baton.pulse import Pulse
from baton.text import Tokenizer
from baton.wire.channel import Listener
from baton.wire.keys import load_keys
from baton.wire.loop import Loop
from router.admission import Served
from router.batching import Rules
from router.catalog import Catalog
from router.role_policy import RolePolicy, Slo
from router.router import Identity, Router


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--address",
    required=True,
    metavar="ADDRESS",
    help="Where to listen: ipc://PATH (folder of mode 0700) or tcp://HOST:PORT (keys).",
)
@click.option(
    "--model",
    default="demo",
    show_default=True,
    help="The model the workers serve; the router reads its tokenizer alone.",
)
@click.option(
    "-b",
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most requests running at once, and in one Fill batch.",
)
@process_options("router")
@click.option(
    "--max-fill-tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Most tokens in one Fill batch.",
)
@click.option(
    "--colocated",
    is_flag=True,
    help="Run without prefill workers: decode workers compute prompts themselves, in chunks.",
)
@click.option(
    "--local-prefill-tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Prompts with at most this many uncached tokens are computed by the decode worker itself.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help=f"Folder of CURVE keys; needed for tcp. See `{COMMAND} keys`.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    default="warning",
    show_default=True,
    help="How much is logged to stderr.",
)
@click.option(
    "--health",
    default=None,
    metavar="HOST:PORT",
    help="Answer /livez and /readyz over HTTP there, for a supervisor such as Kubernetes.",
)
@click.option("--parent", type=int, default=None, hidden=True)
@click.option("--pulse", type=int, default=None, hidden=True)
def main(
    address: str, model: str, batch_size: int, batch_window_ms: float, max_fill_tokens: int,
    max_model_len: int | None, role_policy: str, slo_ttft: float | None, slo_itl: float | None,
    colocated: bool, local_prefill_tokens: int, keys: Path | None, lora: tuple[str, ...],
    allow_lora_updates: str | None, max_loras: int, log_level: str, health: str | None,
    parent: int | None, pulse: int | None,
) -> None:  # fmt: skip
    """Follow every request from prompt to last token. Workers and clients join by themselves:

    python -m router --address ipc:///tmp/baton/router.sock --batch-size 4
    """
    rules = Rules(
        batch_size, batch_window_ms / 1000, max_fill_tokens, colocated, local_prefill_tokens,
        RolePolicy(role_policy), Slo(slo_ttft, slo_itl),
    )  # fmt: skip

    def work() -> int:
        if parent is not None and not die_with(parent):
            sys.exit(0)
        set_up_logging("router", log_level)
        if health is not None:
            parse_address(health)
        channel = Listener(address, load_keys(keys, router=True) if keys else None)
        try:
            served, tokenizer = _served(model, max_model_len, lora)
            updates = allow_lora_updates is not None
            own = served.limits.adapters
            catalog = Catalog(own, model=served.name, updates=updates, most=max_loras)
            identity = Identity(
                f"router/{secrets.token_hex(4)}", host_id(), os.getpid(), core_numbers()
            )
            router = Router(identity, served, tokenizer, rules, monotonic, catalog)
            with _heartbeat(health, pulse) as beat:
                return Loop(router, channel, parent=parent, beat=beat).run()
        finally:
            channel.close()

    leave_with_one_line(work)


@contextmanager
def _heartbeat(address: str | None, pulse: int | None) -> Iterator[Callable[[], None]]:
    """What the loop calls each turn: shows it over HTTP and to the supervisor, if they are there."""
    beats: list[Callable[[], None]] = [] if pulse is None else [Pulse(pulse).beat]
    with ExitStack() as stack:
        if address is not None:
            health = Health(STUCK_S["router"])
            stack.enter_context(closing(HealthServer(address, health)))
            beats.append(health.beat)

        def beat() -> None:
            for each in beats:
                each()

        yield beat


def _served(model: str, max_model_len: int | None, lora: Sequence[str]) -> tuple[Served, Tokenizer]:
    files = resolve_model(model).with_lora(lora)
    return Served.of(files, max_model_len), Tokenizer(files.tokenizer_file)


if __name__ == "__main__":
    main(prog_name="python -m router")
