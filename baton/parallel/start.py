"""Start: the engine of a worker, of one rank or of several."""

from dataclasses import dataclass, replace

import torch

from baton.adapters.below import FLAG
from baton.adapters.files import refuse_ranks
from baton.cluster.launch import WorkerOptions
from baton.dtypes import refuse_narrow_kv
from baton.engine.boot import Engine, boot
from baton.engine.device import pick_device
from baton.errors import InputError
from baton.model_files import ModelFiles
from baton.parallel.ranks import Ranks
from baton.parallel.team import Ended, Team, end_too
from baton.topology import usable_cores


@dataclass(frozen=True, slots=True)
class Division:
    """How a worker is divided. `staged`: see RankPools; None: on GPUs. `ended`: what to do when a rank
    ends by itself."""

    size: int = 1
    threads: int | None = None  # of each rank, on CPUs
    staged: bool | None = None
    ended: Ended = end_too


def with_threads(options: WorkerOptions) -> WorkerOptions:
    """A worker's options, with the threads of each of its ranks: several share those of the worker, and
    the router hands them no cores."""
    size = options.tensor_parallel_size
    if size == 1:
        return options
    return replace(options, threads=max(1, (options.threads or usable_cores()) // size))


def boot_worker(files: ModelFiles, options: WorkerOptions, *, decodes: bool = True) -> Engine:
    """The engine of a worker's process, which lives as long as all of its ranks. Raises as start()."""
    return start(
        files,
        Division(options.tensor_parallel_size, options.threads),
        name=options.name,
        device=options.device,
        dtype=options.dtype,
        kv_dtype=options.kv_cache_dtype,
        block_size=options.block_size,
        decodes=decodes,
    ).engine


@dataclass(frozen=True, slots=True)
class Started:
    """An engine, and the ranks that it runs on, if there are several."""

    engine: Engine
    team: Team | None = None
    ranks: Ranks | None = None

    def close(self) -> None:
        """End the other ranks. A worker's process need not: they end with it."""
        if self.team is not None:
            self.team.close()
        if self.ranks is not None:
            self.ranks.leave()


def start(
    files: ModelFiles,
    division: Division,
    *,
    name: str,
    device: str,
    dtype: str,
    block_size: int,
    kv_dtype: str = "auto",
    decodes: bool = True,
) -> Started:
    """Boot (baton/engine/boot.py) one rank or several. `name`: of the worker, for logs. Raises
    ModelError, InputError, OutOfMemory, WorkerLost."""
    if division.size == 1:
        return Started(
            boot(
                files,
                device=device,
                dtype=dtype,
                kv_dtype=kv_dtype,
                block_size=block_size,
                decodes=decodes,
            )
        )
    if files.adaptable:
        refuse_ranks(division.size, "--lora" if files.lora else FLAG)
    refuse_narrow_kv(kv_dtype, division.size)
    place = pick_device(device)
    check_devices(place, division.size, torch.cuda.device_count())
    from baton.parallel.first import start_ranks  # with transformers: seconds

    return Started(
        *start_ranks(
            files,
            place,
            size=division.size,
            threads=division.threads,
            staged=division.staged,
            ended=division.ended,
            name=name,
            dtype=dtype,
            block_size=block_size,
        )
    )


def check_devices(device: torch.device, size: int, gpus: int) -> None:
    """InputError unless there is a GPU for each rank, or all of them are on the CPU."""
    if device.type == "cpu":
        return
    first = device.index or 0
    if device.type != "cuda" or first + size > gpus:
        raise InputError(
            f"--tensor-parallel-size {size} on {device} needs the GPUs cuda:{first} to "
            f"cuda:{first + size - 1}, and there are {gpus}: use fewer ranks, or --device cpu"
        )
