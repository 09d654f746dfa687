"""Line: the queued requests, and which of them is placed next. Pure.

Requests that were placed before (their worker was lost, their blocks went to an older one, there was no
room) come first, in order of submission: they have been charged for, and a client has part of their
answers. The others follow by fair shares (fairness.py). The first is placed or stops the line, so a big
request is not starved by small ones behind it. Only quarantined requests (tries.py) may be passed by, and
those set aside: embeddings, while no worker can compute them.
"""

from collections.abc import Iterator

from router.fairness import FairQueue
from router.priority import PriorityQueue


class Line:
    """Requests by name. No operation looks at more than a few of them."""

    def __init__(self) -> None:
        self._new = FairQueue()
        self._back = PriorityQueue()  # by order of submission
        self._quarantined = PriorityQueue()
        self._aside = PriorityQueue()  # by size

    def add(
        self,
        name: str,
        tenant: str,
        group: str,
        cost: int,
        priority: int = 0,
        *,
        back: bool = False,
    ) -> None:
        """A new request, which takes about so many tokens. `back`: it was set aside."""
        self._new.add(name, tenant, group, cost, priority, back=back)

    def put_back(self, name: str, serial: int, *, quarantined: bool) -> None:
        """A request that was placed before."""
        (self._quarantined if quarantined else self._back).put(name, serial)

    def first(self, *, quarantined: bool) -> str | None:
        """The next one; with `quarantined` it may be a quarantined one."""
        found = self._back.first()
        if quarantined and (other := self._quarantined.first()):
            found = other if found is None or other[1] < found[1] else found
        return found[0] if found else self._new.first()

    def set_aside(self, name: str, size: int) -> None:
        """This request, the first, is not in the line until it is called back."""
        self.remove(name)
        self._aside.put(name, size)

    def call_back(self, most: float) -> list[str]:
        """Those set aside that are no bigger. They are in no line until they are added or put back."""
        found = []
        while (first := self._aside.first()) and first[1] <= most:
            found.append(first[0])
            self._aside.remove(first[0])
        return found

    @property
    def aside(self) -> str | None:
        """The smallest request that is set aside."""
        found = self._aside.first()
        return found[0] if found else None

    def place(self, name: str) -> None:
        """This request is placed. Its tenant is charged, the first time."""
        if name in self._new:
            self._new.serve(name)
        else:
            self.remove(name)

    def remove(self, name: str) -> None:
        """This request has ended."""
        if name in self._new:
            self._new.remove(name)
        self._back.remove(name)
        self._quarantined.remove(name)
        self._aside.remove(name)

    def settle(self, tenant: str, group: str, cost: int, priority: int = 0) -> None:
        """A request that was placed has ended, and took so many tokens more than was charged."""
        self._new.settle(tenant, group, cost, priority)

    def returned(self) -> Iterator[str]:
        """The requests that were placed before, and all that are set aside."""
        yield from self._back
        yield from self._quarantined
        yield from self._aside
