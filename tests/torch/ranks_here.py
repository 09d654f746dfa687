"""Ranks that are threads of this process: they compute what processes would, and meet at a barrier."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from baton.parallel.ranks import Ranks
from tests.patience import PATIENCE_S

Result = TypeVar("Result")
CPU = torch.device("cpu")


class Meeting:
    """Where they lay down what the others need. The first one that fails breaks it up."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.given: list[torch.Tensor] = [torch.empty(0)] * size


class RanksHere(Ranks):
    """See Ranks. Sums are taken in the order of ranks."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size, CPU)
        self.meeting = meeting

    def all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.given[self.rank] = mine
        self.meeting.barrier.wait()
        found = list(self.meeting.given)
        self.meeting.barrier.wait()
        return found

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        first, *others = self.all(part)
        whole = first.clone()
        for each in others:
            whole += each
        self.meeting.barrier.wait()
        return whole

    def side_by_side(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.all(part), dim=-1)

    def least(self, number: int) -> int:
        return min(int(each) for each in self.all(torch.tensor(number)))


def together(work: Callable[[Ranks], Result], size: int = 2) -> list[Result]:
    """What each of `size` ranks has found. Raises what the first of them raises that fails."""
    meeting = Meeting(size)
    errors: list[BaseException] = []

    def run(rank: int) -> Result:
        try:
            return work(RanksHere(rank, size, meeting))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    if errors:
        raise errors[0]
    return [each.result() for each in futures]
