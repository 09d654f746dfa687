"""AtWork: the workers that compute, and how many of a host's cores each of them gets. Pure.

router/cores.py says how cores are shared, and looks at every worker for it. A decision about one request
(router/roles.py) asks for the number of one worker's cores only, "if this one computed, too". So what it
depends on is kept as it changes: the places of those at work among all that share, and the cores that
they own. tests/pure/test_cores.py compares both.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence


class AtWork:
    """A worker is at work for one reason or for several, each added and removed."""

    def __init__(self) -> None:
        self._reasons: dict[str, int] = {}
        self._cores = 0
        self._places: dict[str, int] = {}  # of those that share the cores
        self._taken: list[int] = []  # places of those at work, sorted
        self._owned = 0  # cores of their own shares

    def share(self, workers: Sequence[str], cores: int) -> None:
        """From now on these share so many cores, in this order. The others have none of them."""
        self._cores = cores
        self._places = {name: i for i, name in enumerate(workers)} if cores else {}
        self._taken = sorted(self._places[name] for name in self._reasons if name in self._places)
        self._owned = sum(map(self._own, self._taken))

    def add(self, worker: str) -> None:
        """There is one more reason."""
        self._reasons[worker] = self._reasons.get(worker, 0) + 1
        place = self._places.get(worker)
        if self._reasons[worker] == 1 and place is not None:
            insort(self._taken, place)
            self._owned += self._own(place)

    def remove(self, worker: str) -> None:
        """There is one less; there must have been one."""
        self._reasons[worker] -= 1
        if self._reasons[worker]:
            return
        del self._reasons[worker]
        if (place := self._places.get(worker)) is not None:
            del self._taken[bisect_left(self._taken, place)]
            self._owned -= self._own(place)

    def __contains__(self, worker: str) -> bool:
        return worker in self._reasons

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def alone(self, worker: str) -> int:
        """How many cores it has while no other one computes; 0 if it does not share them."""
        return self._cores if worker in self._places else 0

    def cores(self, worker: str, beside: str | None = None) -> int:
        """How many cores it has if it computes, and `beside` does, with all that are at work; 0 if it
        does not share them."""
        place = self._places.get(worker)
        if place is None:
            return 0
        joining = [place] if worker not in self._reasons else []
        if beside in self._places and beside != worker and beside not in self._reasons:
            joining.append(self._places[beside])
        at_work = len(self._taken) + len(joining)
        before = bisect_left(self._taken, place) + sum(each < place for each in joining)
        if len(self._places) > self._cores:
            return _part(self._cores, at_work, before)
        idle = self._cores - self._owned - sum(map(self._own, joining))
        return self._own(place) + max(0, -(-(idle - before) // at_work))

    def _own(self, place: int) -> int:
        return _part(self._cores, len(self._places), place)


def _part(cores: int, count: int, index: int) -> int:
    """How many of the cores the one of this index gets, of so many that divide them; at least one."""
    return max(1, -(-cores * (index + 1) // count) + -cores * index // count)
