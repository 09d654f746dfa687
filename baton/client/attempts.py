"""Attempts: which ids at the router belong to one request, after routers were lost.

    r -> lost -> r.1 -> lost -> r.2      of("r.1") == Attempt("r", 4.5, current=False)

A new router, and its events, know only the id of the new attempt.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Attempt:
    """`request`: the id of its first attempt. `after_s`: since that was submitted. Not `current`: another
    attempt has taken its place."""

    request: str
    after_s: float = 0.0
    current: bool = True


class Attempts:
    """Of the requests that were submitted again, if they were live when the last router was lost."""

    def __init__(self) -> None:
        self._known: dict[str, Attempt] = {}

    def of(self, name: str) -> Attempt:
        """What is known of this id; of any other request, that it is its own first attempt."""
        return self._known.get(name) or Attempt(name)

    def forget(self, name: str) -> None:
        """A new request has this id."""
        self._known.pop(name, None)

    def replaced(self, new: Iterable[tuple[str, str, float]]) -> None:
        """Ids of the lost attempts, of those in their places, and seconds since the first submission."""
        live: set[str] = set()
        for lost, name, after_s in new:
            old = self.of(lost)
            live.add(old.request)
            self._known[lost] = replace(old, current=False)
            self._known[name] = Attempt(old.request, after_s)
        self._known = {name: each for name, each in self._known.items() if each.request in live}
