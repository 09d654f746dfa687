"""Ranks: the processes of one tensor-parallel worker, and what they compute together.

A process group of torch.distributed on the loopback device: nccl between GPUs, gloo between processes on
the CPU. Every rank calls the same operations in the same order.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from baton.errors import WorkerLost

START_S = 300.0
"""So long the ranks may take to start, with their imports."""

LONGEST_S = 3600.0
"""Of one operation. The end of a rank is seen at once, and one that is stuck by the router; so this is
only for what nobody thought of."""


class Ranks:
    """This process's membership: `rank` of `size`."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device

    @classmethod
    def join(
        cls, rank: int, size: int, device: torch.device, folder: Path, start_s: float = START_S
    ) -> "Ranks":
        """Meet the others in a private `folder`. WorkerLost if they do not come."""
        loopback = "lo" if sys.platform == "linux" else "lo0"
        for library in ("GLOO", "NCCL"):
            os.environ[f"{library}_SOCKET_IFNAME"] = loopback  # on clusters it names another
        store = dist.FileStore(str(folder / "store"), size)
        store.set(f"rank {rank}", "here")
        absent = next((each for each in range(size) if not _comes(store, each, start_s)), None)
        if absent is not None:
            raise WorkerLost(
                f"rank {absent} of {size} of this tensor-parallel worker did not start within "
                f"{start_s:g} s: see the lines above, and whether the machine is overloaded"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LONGEST_S),
        )  # fmt: skip
        return cls(rank, size, device)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, equal on each of them to the last bit."""
        whole = part.contiguous()
        dist.all_reduce(whole)
        return whole

    def side_by_side(self, part: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks, joined along the last dimension in order."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim=-1)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        found = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found.item())

    def wait(self) -> None:
        """Until every rank has come here."""
        self.least(0)

    def leave(self) -> None:
        """End the membership of this process."""
        dist.destroy_process_group()


def _comes(store: dist.FileStore, rank: int, start_s: float) -> bool:
    try:
        store.wait([f"rank {rank}"], timedelta(seconds=start_s))
    except RuntimeError:  # DistStoreError is one
        return False
    return True
