"""LocalFills: the prompts that decode workers fill by themselves, and how far they are. Pure.

A decode worker says nothing about them until the first token, because a message for each chunk would slow
its streams. So what is left of the oldest is estimated by the time since it is the oldest.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Fills:
    """Of one worker. `since`: when the first of them became the oldest."""

    tokens: dict[str, int] = field(default_factory=dict)  # by request
    since: float = 0.0


class LocalFills:
    """Of all decode workers."""

    def __init__(self) -> None:
        self._workers: dict[str, _Fills] = {}
        self._of: dict[str, str] = {}  # worker, by request

    def moved(self, request: str, decode: str | None, tokens: int, now: float) -> None:
        """It is in another state. `decode`: this worker was told to compute so many tokens by itself."""
        self.ended(request, now)
        if decode is None or tokens < 1:
            return
        fills = self._workers.setdefault(decode, _Fills(since=now))
        fills.tokens[request] = tokens
        self._of[request] = decode

    def ended(self, request: str, now: float) -> None:
        """It has its first token, or left the worker. Does nothing if there is no such fill."""
        decode = self._of.pop(request, None)
        if decode is None:
            return
        fills = self._workers[decode]
        if next(iter(fills.tokens)) == request:
            fills.since = now
        del fills.tokens[request]
        if not fills.tokens:
            del self._workers[decode]

    def count(self, decode: str) -> int:
        """Prompts that it fills now."""
        fills = self._workers.get(decode)
        return len(fills.tokens) if fills is not None else 0

    def left(self, decode: str, now: float, tokens_per_s: float) -> tuple[int, ...]:
        """Tokens that are left of each, oldest first, if it computes so many a second."""
        fills = self._workers.get(decode)
        if fills is None:
            return ()
        done = int(max(0.0, now - fills.since) * tokens_per_s)
        oldest, *others = fills.tokens.values()
        return (max(1, oldest - done), *others)
