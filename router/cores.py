"""Who computes on which cores of this host. Two workers on one core cost each other far more than
half (docs/performance.md), and a core whose owner has nothing to do is wasted on it.

    both at work          prefill  0        decode  1
    only decode at work   prefill (0)       decode  0 1

Every worker has a part of its own, always there for it; whoever is at work also gets the parts of
those who are not. A worker that gets work finds its own part lent out for one more step of the
borrower at most, and need not ask for it.
"""

from collections.abc import Iterable, Sequence

from baton.lifecycle import State
from baton.wire.messages import Cores
from baton.wire.node import Effect, To
from router.ledger import Ledger
from router.members import Members


class CoreKeeper:
    """Hands out `cores` of `host` to the workers there that take them."""

    def __init__(self, host: str, cores: Sequence[int]) -> None:
        self._host = host
        self._cores = tuple(cores)
        self._told: dict[str, tuple[str, tuple[int, ...]]] = {}  # worker -> epoch, its cores

    def hand_out(self, members: Members, ledger: Ledger) -> list[Effect]:
        """Orders to those whose cores have changed."""
        here = (m.hello for m in members if m.hello.takes_cores and m.hello.host == self._host)
        sharers = {hello.worker: hello for hello in here}
        self._told = {worker: told for worker, told in self._told.items() if worker in sharers}
        if not sharers or not self._cores:
            return []
        busy = {each.prefill for each in ledger.in_state(State.FILLING)}
        busy |= {each.decode for each in ledger.in_state(State.DECODING)}
        effects: list[Effect] = []
        names = sorted(sharers, key=lambda name: (sharers[name].role, name))
        for worker, cores in shares(
            self._cores, names, [name for name in names if name in busy]
        ).items():
            told = (sharers[worker].epoch, cores)
            if self._told.get(worker) != told:
                self._told[worker] = told
                effects.append(To(worker, Cores(cores)))
        return effects


def shares(
    cores: Sequence[int], workers: Sequence[str], busy: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Cores of each worker. Those at work have no core in common, unless there are more of them than
    cores; and none is left over while anybody is at work."""
    own = _split(cores, workers)
    at_work = [worker for worker in workers if worker in set(busy)]
    if not at_work:
        return own
    if len(workers) > len(cores):
        return own | _split(cores, at_work)
    idle = [core for worker in workers if worker not in at_work for core in own[worker]]
    for i, core in enumerate(idle):
        worker = at_work[i % len(at_work)]
        own[worker] = tuple(sorted((*own[worker], core)))
    return own


def _split(cores: Sequence[int], workers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Evenly, side by side, the first getting what does not divide; one each where they are few."""
    count, total = len(workers), len(cores)
    if count > total:
        return {worker: (cores[i % total],) for i, worker in enumerate(workers)}
    ends = [-(-total * (i + 1) // count) for i in range(count)]
    starts = [0, *ends[:-1]]
    return {
        worker: tuple(cores[start:end])
        for worker, start, end in zip(workers, starts, ends, strict=True)
    }
