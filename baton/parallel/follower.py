"""`python -m baton.parallel.follower FD PARENT`: a rank of a tensor-parallel worker other than the first.

The first rank starts it, sends its settings and then its orders over the socket FD (orders.py). It knows
no router. It ends with the first rank: by the kernel, and because the socket is closed.
"""

import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from baton import failpoint
from baton.cluster.launch import leave_with_one_line
from baton.engine.boot import sorted_out
from baton.engine.pool import Beside
from baton.host import die_with
from baton.log import set_up_logging
from baton.model_files import resolve_model
from baton.parallel.boot import Booted, boot_rank
from baton.parallel.orders import (
    ARRIVED,
    DROP,
    FORWARDS,
    MAP,
    SIZE,
    region_of,
    rows_of,
    unpack_order,
)
from baton.parallel.pools import RankPools
from baton.parallel.ranks import Ranks


def main() -> None:
    """Follow until the first rank ends."""
    descriptor, parent = (int(each) for each in sys.argv[1:])
    for each in (signal.SIGINT, signal.SIGTERM):  # the first rank decides when this worker ends
        signal.signal(each, signal.SIG_IGN)
    if die_with(parent):
        leave_with_one_line(lambda: follow(Connection(descriptor)))


def follow(orders: Connection) -> int:
    """Boot, then do what is ordered. Returns the exit code once nobody orders any more."""
    try:
        _, (settings,) = unpack_order(orders.recv_bytes())
        ranks, booted = _boot(**settings)
        pools = RankPools(booted, ranks, staged=settings["staged"])
        while True:
            kind, fields = unpack_order(orders.recv_bytes())
            carry_out(kind, fields, booted, pools)
    except EOFError:
        return 0


@torch.inference_mode()
def carry_out(kind: str, fields: list[Any], booted: Booted, pools: RankPools) -> None:
    """One order."""
    if kind == SIZE:
        memory_bytes, tokens, beside = fields
        pools.size(memory_bytes, tokens, Beside(*beside) if beside is not None else None)
        return
    number = fields[0]
    if kind in FORWARDS:
        failpoint.hit("follower.step")
        rows, stored = rows_of(fields[1]), fields[2]
        getattr(booted.runner, kind)(pools.of(number), rows)
        if stored:
            pools.store(number, rows)
    elif kind == MAP:
        pools.map(number, fields[1], region_of(fields[2]))
    elif kind == ARRIVED:
        pools.load(number, fields[1])
    else:
        assert kind == DROP
        pools.drop(number)


def _boot(
    *,
    rank: int,
    size: int,
    name: str,
    log_level: str,
    model: str,
    device: str,
    dtype: str,
    block_size: int,
    folder: str,
    threads: int | None,
    staged: bool,
) -> tuple[Ranks, Booted]:
    """`staged`: see RankPools."""
    set_up_logging(f"{name}/{rank}", log_level)
    if threads is not None:
        torch.set_num_threads(threads)
    files = resolve_model(model)
    place = torch.device(device)
    place = torch.device("cuda", (place.index or 0) + rank) if place.type == "cuda" else place
    ranks = Ranks.join(rank, size, place, Path(folder))
    load = lambda: boot_rank(files, ranks, dtype=dtype, block_size=block_size)  # noqa: E731
    return ranks, sorted_out(files, load)


if __name__ == "__main__":
    main()
