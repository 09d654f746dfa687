"""Launch: what the worker commands share: options, the Hello message, and running a node as a process.
It does not import torch, so that `--help` and errors in options are fast."""

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import click
import zmq

from baton import failpoint
from baton.adapters.identity import Adapters
from baton.errors import BatonError, InputError
from baton.health import Health, HealthServer, parse_address
from baton.host import core_numbers, die_with, host_id, process_age_s
from baton.kv.layout import KVLayout
from baton.kv.region import Region
from baton.log import LEVELS, set_up_logging
from baton.model_files import resolve_model
from baton.pace import LEAST_TOKENS
from baton.package import COMMAND
from baton.wire.channel import Dialer, check_address
from baton.wire.keys import ClusterKeys, load_keys
from baton.wire.loop import Loop
from baton.wire.messages import PROTOCOL, Hello
from baton.wire.node import Node

PATIENCE_FLOOR_S = 10.0
"""For what a step may do besides a forward: open a link to a pool, load kernels, wait for a core."""
PATIENCE_STEPS = 5
STEP_TOKENS = 4 * LEAST_TOKENS
"""Forwards are sized by time (baton/pace.py). The longest has LEAST_TOKENS although there is no time for
them: far into a long sequence they take as long as four times as many at its beginning."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options that every worker command takes."""

    router: str
    model: str
    device: str
    dtype: str
    name: str  # unique to this boot of the process: the command's --name and a random tail
    threads: int | None
    block_size: int
    max_model_len: int | None
    max_num_batched_tokens: int
    drain_timeout: float  # seconds from SIGTERM until it ends at the latest
    keys: ClusterKeys | None
    parent: int | None
    health: str | None = None  # HOST:PORT
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1  # ranks
    lora: tuple[str, ...] = ()  # adapters, NAME=FOLDER each
    allow_lora_updates: str | None = None  # the folder of those that come and go
    idle: float = 0.0  # seconds that this process waited for its command (baton/cluster/standby.py)


_OPTIONS = [
    click.option("--router", required=True, metavar="ADDRESS",
                 help="Where the router listens: ipc://PATH or tcp://HOST:PORT."),
    click.option("--model", default="demo", show_default=True,
                 help="A name of configs/model_paths.yaml, a folder, or a Hugging Face id."),
    click.option("--device", default="auto", show_default=True,
                 help="cuda:0, cuda:1, cpu, or auto."),
    click.option("--name", default=None, help="This worker's name in logs and reports."),
    click.option("--threads", type=click.IntRange(min=1), default=None,
                 help="CPU threads to compute with.  [default: the cores that the router hands out]"),
    click.option("--keys", type=click.Path(path_type=Path, file_okay=False), default=None,
                 help=f"Folder of CURVE keys; needed for tcp. See `{COMMAND} keys`."),
    click.option("--log-level", type=click.Choice(LEVELS), default="warning", show_default=True,
                 help="How much is logged to stderr."),
    click.option("--health", default=None, metavar="HOST:PORT",
                 help="Answer /livez and /readyz over HTTP there, for a supervisor such as Kubernetes."),
    click.option("--parent", type=int, default=None, hidden=True),
    click.option("--idle", type=float, default=0.0, hidden=True),
]  # fmt: skip


def worker_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_worker_options(role: str, given: dict[str, Any]) -> WorkerOptions:
    """Take the shared options out of `given`. Sets up logging and ties this process to its parent."""
    parent = given.pop("parent")
    if parent is not None and not die_with(parent):
        sys.exit(0)
    failpoint.hit("worker.begin")
    name = given.pop("name") or role
    set_up_logging(name, given.pop("log_level"))
    folder = given.pop("keys")
    keys = None if folder is None else load_keys(folder)
    check_address(given["router"], keys)  # before seconds are spent on loading torch and a model
    if given["health"] is not None:
        parse_address(given["health"])
    if given["device"] == "mps":
        raise InputError(
            "a worker cannot use mps: no KV transport reads an Apple GPU; use --device cpu"
        )
    resolve_model(given["model"])
    calm_openmp()
    return WorkerOptions(
        name=f"{name}.{secrets.token_hex(3)}",
        keys=keys,
        parent=parent,
        **{field: given.pop(field) for field in WorkerOptions.__slots__ if field in given},
    )


def calm_openmp() -> None:
    """To be called before torch is loaded. OpenMP's idle threads spin for milliseconds: on cores that
    others use too, a step then takes 20 times as long (docs/performance.md)."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def introduce(
    options: WorkerOptions,
    role: str,
    *,
    fingerprint: str,
    device: str,
    dtype: str,
    layout: KVLayout,
    token_s: float,
    how: str,
    blocks: int = 0,
    regions: tuple[Region, ...] = (),
    adapters: Adapters = (),
) -> Hello:
    """This worker's Hello. Its patience is several times its longest step, estimated from the measured
    time of one token."""
    longest_step_s = token_s * min(STEP_TOKENS, options.max_num_batched_tokens)
    return Hello(
        role=role,
        worker=options.name,
        epoch=first_epoch(options),
        protocol=PROTOCOL,
        host=host_id(),
        pid=os.getpid(),
        device=device,
        model=fingerprint,
        adapters=adapters,
        dtype=dtype,
        kv_dtype=layout.dtype,
        layout=layout.fingerprint,
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        blocks=blocks,
        regions=regions,
        patience_s=PATIENCE_FLOOR_S + PATIENCE_STEPS * longest_step_s,
        load_s=max(0.0, process_age_s() - options.idle),
        how=how,
        takes_cores=device == "cpu" and options.threads is None and bool(core_numbers()),
    )


def first_epoch(options: WorkerOptions) -> str:
    """The name of a worker's first epoch."""
    return f"{options.name}/0"


class WorkerNode(Node, Protocol):
    """The logic of a worker."""

    @property
    def joined(self) -> bool:
        """Whether a router has taken it in."""


def run_worker(
    options: WorkerOptions,
    node: WorkerNode,
    wakeups: Callable[[], Sequence[zmq.Socket[bytes]]] = tuple,
    *,
    patience_s: float = PATIENCE_FLOOR_S,
) -> int:
    """Connect to the router and run the node. Returns the exit code. `patience_s`: of its Hello; a loop
    that has not turned for so long is reported as stuck."""
    health = Health(patience_s)
    listening: AbstractContextManager[object] = nullcontext()
    if options.health is not None:
        listening = closing(HealthServer(options.health, health))

    def beat() -> None:
        health.beat("" if node.joined else f"not taken in by the router at {options.router}")

    with listening, closing(Dialer(options.name, options.router, options.keys)) as channel:
        return Loop(
            node, channel, parent=options.parent, wakeups=wakeups, drain_s=options.drain_timeout,
            beat=beat,
        ).run()  # fmt: skip


def leave_with_one_line(work: Callable[[], int]) -> NoReturn:
    """Run a command and exit. A BatonError is printed as one line and has its own exit code."""
    try:
        code = work()
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads of libraries


def private_folder(path: Path | None) -> Path | None:
    """The folder for a worker's sockets, created if missing. InputError if other users can enter it."""
    if path is None:
        return None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise InputError(f"cannot use {path} for sockets: {error.strerror}") from error
    if mode & 0o077:
        raise InputError(f"{path} is open to other users (mode {mode:04o}): run `chmod 700 {path}`")
    return path
