"""The first rank of a worker of several: it starts the others, loads its part and gives the orders.

A module of its own: what it imports brings transformers along, seconds that a worker of one rank with a
stored program need not wait for.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from baton.engine.boot import Engine, sorted_out
from baton.engine.loading import shape_of
from baton.model_files import ModelFiles, absolute_name
from baton.parallel.boot import Booted, boot_rank
from baton.parallel.plan import plan_sharding
from baton.parallel.pools import SharedPools
from baton.parallel.ranks import Ranks
from baton.parallel.runner import ParallelRunner
from baton.parallel.team import Ended, Team


def start_ranks(
    files: ModelFiles,
    device: torch.device,
    *,
    size: int,
    threads: int | None,
    staged: bool | None,
    ended: Ended,
    name: str,
    dtype: str,
    block_size: int,
) -> tuple[Engine, Team, Ranks]:
    """Boot `size` ranks from `device` on, for start() (baton/parallel/start.py), which says what the
    rest is and what is raised."""
    with tempfile.TemporaryDirectory(prefix=f"baton-{os.getpid()}-ranks-") as folder:
        # It is there until they have met.
        settings = {
            "size": size,
            "name": name,
            "log_level": logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower(),
            "model": absolute_name(files.name),
            "device": str(device),
            "dtype": dtype,
            "block_size": block_size,
            "folder": folder,
            "threads": threads,
            "staged": device.type == "cuda" if staged is None else staged,
        }
        team = Team(size, settings, ended)
        try:
            return _first_rank(files, team, settings, device)
        except BaseException:
            team.close()
            raise


def _first_rank(
    files: ModelFiles, team: Team, settings: dict[str, Any], device: torch.device
) -> tuple[Engine, Team, Ranks]:
    size, block_size, staged = settings["size"], settings["block_size"], settings["staged"]

    def plan() -> None:
        plan_sharding(shape_of(files), size, files.name)  # refused before any weight is read

    def load() -> Booted:
        return boot_rank(files, ranks, dtype=settings["dtype"], block_size=block_size)

    sorted_out(files, plan)
    ranks = Ranks.join(0, size, device, Path(settings["folder"]))
    booted = sorted_out(files, load)
    pools = SharedPools(booted, ranks, team, staged=staged)
    runner = ParallelRunner(booted.runner, pools, team)
    engine = Engine(
        files, runner, booted.layout, device, booted.dtype, booted.token_s, booted.pace, pools
    )
    return engine, team, ranks
