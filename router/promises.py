"""Promises: prompts that prefill workers are to fill, as decided, and that are not sent to them. Pure.

Requests that are granted their blocks together are decided one after the other and sent together. Each
decision must know of those before it, or all of them would see an idle prefill worker.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Promised:
    """To one worker."""

    tokens: dict[str, int] = field(
        default_factory=dict
    )  # by request, in the order of the decisions
    total: int = 0


class Promises:
    """To all prefill workers. A promise ends as its request is sent, started, queued again or ended."""

    def __init__(self) -> None:
        self._workers: dict[str | None, _Promised] = {}
        self._of: dict[str, str | None] = {}  # worker, by request

    def put(self, request: str, worker: str | None, tokens: int) -> None:
        """This worker is to compute so many tokens; None: whichever can, and none can now. The request
        must have no promise."""
        assert request not in self._of
        promised = self._workers.setdefault(worker, _Promised())
        promised.tokens[request] = tokens
        promised.total += tokens
        self._of[request] = worker

    def end(self, request: str) -> str | None:
        """The worker that had promised it, if there is one."""
        if request not in self._of:
            return None
        worker = self._of.pop(request)
        promised = self._workers[worker]
        promised.total -= promised.tokens.pop(request)
        if not promised.tokens:
            del self._workers[worker]
        return worker

    def total(self, worker: str | None) -> int:
        """Tokens that it is to compute."""
        promised = self._workers.get(worker)
        return promised.total if promised is not None else 0

    def amounts(self, worker: str | None) -> tuple[int, ...]:
        """Of each request, in the order of the decisions."""
        promised = self._workers.get(worker)
        return tuple(promised.tokens.values()) if promised is not None else ()

    def requests(self, worker: str | None) -> tuple[str, ...]:
        """That are promised to it, in that order."""
        promised = self._workers.get(worker)
        return tuple(promised.tokens) if promised is not None else ()

    def __iter__(self) -> Iterator[tuple[str, str | None, int]]:
        """Each request, its worker and its tokens."""
        for worker, promised in self._workers.items():
            for request, tokens in promised.tokens.items():
                yield request, worker, tokens
