"""Loads: what every worker has been given, counted as it changes, and the workers in order of it. Pure.

The ledger keeps it with its states. So no decision of the router looks at all requests or at all workers:
placing one costs the same with ten requests as with ten thousand. Every count here has a slow definition
over the ledger's entries, and tests/pure/slow_loads.py compares both after every turn.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from router.at_work import AtWork
from router.local_fills import LocalFills
from router.promises import Promises

Rank = tuple[int, int, str]
"""Of two workers the one with the smaller rank is less loaded. See Loads.decodes and Loads.prefills."""
NOTHING: tuple[str, ...] = ()


class Ranking:
    """Workers by rank, the smallest first."""

    def __init__(self) -> None:
        self._sorted: list[Rank] = []
        self._ranks: dict[str, Rank] = {}

    def put(self, rank: Rank) -> None:
        """Add a worker, or move it to its new place."""
        worker = rank[-1]
        if (old := self._ranks.get(worker)) is not None:
            del self._sorted[bisect_left(self._sorted, old)]
        insort(self._sorted, rank)
        self._ranks[worker] = rank

    def remove(self, worker: str) -> None:
        """Does nothing if the worker is not there."""
        if (old := self._ranks.pop(worker, None)) is not None:
            del self._sorted[bisect_left(self._sorted, old)]

    def of(self, worker: str) -> Rank | None:
        """The worker's rank, if it is there."""
        return self._ranks.get(worker)

    def __iter__(self) -> Iterator[Rank]:
        return iter(self._sorted)


@dataclass(slots=True)
class Load:
    """Of one worker."""

    amounts: dict[str, int] = field(default_factory=dict)  # by request; see Loads
    total: int = 0  # of the amounts
    computing: int = 0  # requests that it decodes or fills now

    def set(self, request: str, amount: int) -> None:
        self.total += amount - self.amounts.get(request, 0)
        self.amounts[request] = amount

    def remove(self, request: str) -> None:
        self.total -= self.amounts.pop(request)


class Loads:
    """Of all workers. The amount of a request is in blocks on a decode worker (those of its tokens and
    one more: it will grow soon), and in tokens still to be filled on a prefill worker."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self.fills = LocalFills()
        self.promises = Promises()
        self._pools: dict[str, int | None] = {}  # of those that have joined; None: it fills
        self.decodes = Ranking()  # (requests, blocks held less blocks of the pool, name)
        self.prefills = Ranking()  # (tokens to fill, 0, name)
        self.expected = Ranking()  # the same with those that are promised
        self.busy: set[str] = set()  # workers that compute a request
        self.busy_changes = 0  # how often that has changed
        self.soon = AtWork()  # these, and those that are promised a prompt

    # ---- workers

    def joined(self, worker: str, pool: int | None) -> None:
        """The worker may be given requests. `pool`: blocks of a decode worker; None: a prefill worker."""
        self._pools[worker] = pool
        self._rank(worker, self._loads.setdefault(worker, Load()))

    def left(self, worker: str) -> None:
        """The worker is gone. What it was given is removed as the requests leave it."""
        self._pools.pop(worker, None)
        self.decodes.remove(worker)
        self.prefills.remove(worker)
        self.expected.remove(worker)
        self._tidy(worker)

    # ---- requests

    def promised(self, request: str, prefill: str | None, tokens: int) -> None:
        """It is decided that a prefill worker fills it, this one as far as is known now."""
        self.end_promise(request)
        self.promises.put(request, prefill, tokens)
        if prefill is not None:
            self.soon.add(prefill)
            self._rank(prefill, self._loads[prefill])

    def moved(self, request: str, decode: str | None, tokens: int, now: float) -> None:
        """It is in another state. `decode`: this worker was told to compute so many tokens by itself."""
        self.end_promise(request)
        self.fills.moved(request, decode, tokens, now)

    def end_promise(self, request: str) -> None:
        """No prefill worker is expected to fill it any more. Does nothing if none was."""
        prefill = self.promises.end(request)
        if prefill is not None:
            self.soon.remove(prefill)
            if prefill in self._loads:
                self._rank(prefill, self._loads[prefill])

    def placed(self, request: str, decode: str, blocks: int) -> None:
        """A request was placed on this decode worker, or has grown there: it holds so many blocks."""
        load = self._loads.setdefault(decode, Load())
        load.set(request, blocks + 1)
        self._rank(decode, load)

    def removed(self, request: str, decode: str, *, decoding: bool) -> None:
        """The decode worker holds no blocks for it any more. `decoding`: it was decoded until now."""
        load = self._loads[decode]
        load.remove(request)
        if decoding:
            self._computes(decode, load, -1)
        self._rank(decode, load)
        self._tidy(decode)

    def decoding(self, decode: str) -> None:
        """One request more is decoded there."""
        self._computes(decode, self._loads[decode], 1)

    def filling(self, request: str, prefill: str, tokens: int) -> None:
        """A prefill worker has so many tokens to compute for it."""
        load = self._loads.setdefault(prefill, Load())
        load.set(request, tokens)
        self._computes(prefill, load, 1)
        self._rank(prefill, load)

    def progressed(self, request: str, prefill: str, tokens: int) -> None:
        """So many of them are left."""
        load = self._loads[prefill]
        load.set(request, tokens)
        self._rank(prefill, load)

    def filled(self, request: str, prefill: str) -> None:
        """It fills the request no longer."""
        load = self._loads[prefill]
        load.remove(request)
        self._computes(prefill, load, -1)
        self._rank(prefill, load)
        self._tidy(prefill)

    def on_worker(self, worker: str) -> Sequence[str]:
        """The requests that need this worker now, in the order in which they came to it."""
        load = self._loads.get(worker)
        return tuple(load.amounts) if load is not None else NOTHING

    def amounts(self, worker: str) -> tuple[int, ...]:
        """Of each of its requests, in that order."""
        load = self._loads.get(worker)
        return tuple(load.amounts.values()) if load is not None else ()

    def computing(self, worker: str) -> int:
        """Requests that the worker decodes or fills now."""
        load = self._loads.get(worker)
        return load.computing if load is not None else 0

    # ---- counts

    def _computes(self, worker: str, load: Load, more: int) -> None:
        before, load.computing = load.computing, load.computing + more
        if bool(before) == bool(load.computing):
            return
        self.busy_changes += 1
        if load.computing:
            self.busy.add(worker)
            self.soon.add(worker)
        else:
            self.busy.remove(worker)
            self.soon.remove(worker)

    def _rank(self, worker: str, load: Load) -> None:
        """A worker that is gone gets nothing new, and has no rank."""
        if worker not in self._pools:
            return
        pool = self._pools[worker]
        if pool is None:
            self.prefills.put((load.total, 0, worker))
            self.expected.put((load.total + self.promises.total(worker), 0, worker))
        else:
            self.decodes.put((len(load.amounts), load.total - pool, worker))

    def _tidy(self, worker: str) -> None:
        """Nothing is remembered of a worker that is gone."""
        load = self._loads.get(worker)
        if load is not None and not load.amounts and worker not in self._pools:
            del self._loads[worker]
