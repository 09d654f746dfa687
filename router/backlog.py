"""Backlog: what waits for the workers of each role, and for how long. Autoscalers act on it.

    decode     queued, reserving       waits until a decode worker grants blocks
    prefill    reserved, filling       waits until its prompt is filled

Changes are counted as they happen, so no request is looked at twice and a report costs the same for ten
requests and for ten thousand.
"""

from dataclasses import dataclass

from baton.lifecycle import State
from baton.wire.records import RoleBacklog
from router.ledger import Entry
from router.workers import DECODE, PREFILL

WAITS_FOR = {
    State.QUEUED: DECODE,
    State.RESERVING: DECODE,
    State.RESERVED: PREFILL,
    State.FILLING: PREFILL,
}


@dataclass(slots=True)
class _Waiting:
    tokens: int
    since: float


class Backlog:
    """Waiting requests by role, in the order in which they began to wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, _Waiting]] = {DECODE: {}, PREFILL: {}}
        self._tokens = dict.fromkeys(self._waiting, 0)

    def moved(self, entry: Entry, now: float) -> None:
        """The entry is in a new state. While it waits for the same role it keeps its place."""
        role = WAITS_FOR.get(entry.state)
        for other, waiting in self._waiting.items():
            if other != role and (left := waiting.pop(entry.id, None)) is not None:
                self._tokens[other] -= left.tokens
        if role is not None and entry.id not in self._waiting[role]:
            tokens = max(0, entry.unfilled if role == PREFILL else entry.length)
            self._waiting[role][entry.id] = _Waiting(tokens, now)
            self._tokens[role] += tokens

    def filled_to(self, entry: Entry, tokens: int) -> None:
        """The KV of its first `tokens` is computed."""
        if (waiting := self._waiting[PREFILL].get(entry.id)) is not None:
            left = min(waiting.tokens, max(0, entry.length - 1 - tokens))
            self._tokens[PREFILL] -= waiting.tokens - left
            waiting.tokens = left

    def report(self, now: float) -> tuple[RoleBacklog, ...]:
        """Of both roles."""
        found = []
        for role, waiting in self._waiting.items():
            oldest = next(iter(waiting.values()), None)
            age_s = max(0.0, now - oldest.since) if oldest is not None else 0.0
            found.append(RoleBacklog(role, len(waiting), self._tokens[role], age_s))
        return tuple(found)
