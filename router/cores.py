"""CoreKeeper: shares the cores of this host among its workers. Two workers on one core slow each other by
far more than half (docs/performance.md), and the cores of an idle worker would be wasted.

    both busy             prefill  0        decode  1
    only decode busy      prefill (0)       decode  0 1

Every worker owns a share of the cores; busy workers also get the shares of idle ones. A worker that gets
work has its own share back after at most one more step of the borrower.
"""

from collections.abc import Collection, Sequence

from baton.wire.messages import Cores
from baton.wire.node import Effect, To
from router.ledger import Ledger
from router.workers import WorkerRegistry


class CoreKeeper:
    """Assigns the `cores` of `host` to the workers there that accept them."""

    def __init__(self, host: str, cores: Sequence[int]) -> None:
        self._host = host
        self._cores = tuple(cores)
        self._sent: dict[str, tuple[str, tuple[int, ...]]] = {}  # worker -> epoch, its cores
        self._seen: tuple[object, int] = (
            None,
            0,
        )  # hellos, changes of who is busy: at the last call
        self._names: list[str] = []  # of the workers here that take cores, in order

    def hand_out(self, members: WorkerRegistry, ledger: Ledger) -> list[Effect]:
        """Orders to the workers whose cores have changed."""
        hellos, loads = members.hellos, ledger.loads
        before, self._seen = self._seen, (hellos, loads.busy_changes)
        if hellos is before[0] and loads.busy_changes == before[1]:
            return []
        here = (hello for hello in hellos if hello.takes_cores and hello.host == self._host)
        sharers = {hello.worker: hello for hello in here}
        self._sent = {worker: sent for worker, sent in self._sent.items() if worker in sharers}
        if hellos is not before[0]:
            self._names = sorted(sharers, key=lambda name: (sharers[name].role, name))
            loads.soon.share(self._names, len(self._cores))
        if not sharers or not self._cores:
            return []
        effects: list[Effect] = []
        for worker, cores in shares(self._cores, self._names, loads.busy).items():
            order = (sharers[worker].epoch, cores)
            if self._sent.get(worker) != order:
                self._sent[worker] = order
                effects.append(To(worker, Cores(cores)))
        return effects


def shares(
    cores: Sequence[int], workers: Sequence[str], busy: Collection[str | None]
) -> dict[str, tuple[int, ...]]:
    """Cores of each worker. Busy workers share no core, unless there are more workers than cores. While
    any worker is busy, no core is idle."""
    own = _split(cores, workers)
    at_work = [worker for worker in workers if worker in busy]
    if not at_work:
        return own
    if len(workers) > len(cores):
        return own | _split(cores, at_work)
    idle = [core for worker in workers if worker not in busy for core in own[worker]]
    for i, core in enumerate(idle):
        worker = at_work[i % len(at_work)]
        own[worker] = tuple(sorted((*own[worker], core)))
    return own


def _split(cores: Sequence[int], workers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Evenly, in adjacent ranges; one core each where there are more workers than cores."""
    count, total = len(workers), len(cores)
    if count > total:
        return {worker: (cores[i % total],) for i, worker in enumerate(workers)}
    ends = [-(-total * (i + 1) // count) for i in range(count)]
    starts = [0, *ends[:-1]]
    return {
        worker: tuple(cores[start:end])
        for worker, start, end in zip(workers, starts, ends, strict=True)
    }
