"""PriorityQueue: names by priority, the smallest first. Any name can be removed, not only the first.

A heap cannot remove from its middle: what was removed stays until it comes to the top, or until most of
the heap is such. So an operation takes O(log n) on average, and memory is proportional to the names.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

SPARE = 64
"""Removed names that may always stay in the heap."""


class PriorityQueue:
    """Of equal priorities the one that was put first comes first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []
        self._current: dict[str, tuple[float, int, str]] = {}
        self._puts = 0

    def put(self, name: str, priority: float) -> None:
        """Add a name, or change its priority."""
        self._puts += 1
        item = self._current[name] = (priority, self._puts, name)
        if len(self._heap) > 2 * len(self._current) + SPARE:
            self._heap = list(self._current.values())
            heapify(self._heap)
        else:
            heappush(self._heap, item)

    def remove(self, name: str) -> None:
        """Does nothing if the name is not there."""
        self._current.pop(name, None)

    def first(self) -> tuple[str, float] | None:
        """The name with the smallest priority, and that; None if there is none."""
        heap = self._heap
        while heap and self._current.get(heap[0][2]) != heap[0]:
            heappop(heap)
        return (heap[0][2], heap[0][0]) if heap else None

    def priority(self, name: str) -> float:
        """Of a name that is there."""
        return self._current[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self._current

    def __iter__(self) -> Iterator[str]:
        """In no particular order."""
        return iter(self._current)

    def in_order(self) -> list[tuple[str, float]]:
        """All names with their priorities, the smallest first. For tests: it sorts."""
        return [(name, priority) for priority, _, name in sorted(self._current.values())]

    def __len__(self) -> int:
        return len(self._current)
