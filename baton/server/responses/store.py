"""Store: responses and their conversations, in memory, for previous_response_id. Pure.

    store.put(tenant, id, response, conversation)
    store.get(tenant, id)                             None if it is not, or not any more, there

The number of responses and the bytes of all are bounded. Beyond, the tenant that holds the most forgets
its oldest, so nobody's conversations are lost to the many of another. The turns of a conversation are
segments that its responses share: a conversation of n turns takes n segments, not n * n / 2.
A tenant (an API key, else a client's address) sees its own only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_RESPONSES = 4096
MOST_BYTES = 64 << 20
OVERHEAD = 512
"""Bytes counted for each response and segment beside its JSON."""


@dataclass(eq=False, slots=True)
class Segment:
    """JSON of the items that one turn added to a conversation."""

    data: bytes
    holders: int = 0  # responses whose conversation it is a part of


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as JSON, and its conversation up to its own output."""

    response: bytes
    conversation: tuple[Segment, ...]


class Store:
    """`responses`, `size`: the most, in number and bytes."""

    def __init__(self, *, responses: int = MOST_RESPONSES, size: int = MOST_BYTES) -> None:
        self.most_responses, self.most_bytes = responses, size
        self._held: dict[str, dict[str, Stored]] = {}  # by tenant and id, the oldest first
        self._sizes: dict[str, int] = {}  # bytes, by tenant
        self.responses = self.bytes = 0

    def get(self, tenant: str, name: str) -> Stored | None:
        return self._held.get(tenant, {}).get(name)

    def put(
        self, tenant: str, name: str, response: bytes, new: bytes, before: Sequence[Segment]
    ) -> None:
        """Keep a response whose turn added the items `new` to the conversation `before`."""
        found = Stored(response, (*before, Segment(new)))
        self._held.setdefault(tenant, {})[name] = found
        self.responses += 1
        self._count(tenant, len(response) + OVERHEAD)
        for each in found.conversation:
            each.holders += 1
            if each.holders == 1:
                self._count(tenant, len(each.data) + OVERHEAD)
        while self.responses > self.most_responses or self.bytes > self.most_bytes:
            self._forget_oldest()

    def forget(self, tenant: str, name: str) -> bool:
        """Was it there? Conversations that went on from it are kept."""
        found = self._held.get(tenant, {}).pop(name, None)
        if found is None:
            return False
        self.responses -= 1
        self._count(tenant, -len(found.response) - OVERHEAD)
        for each in found.conversation:
            each.holders -= 1
            if not each.holders:
                self._count(tenant, -len(each.data) - OVERHEAD)
        if not self._held[tenant]:
            del self._held[tenant], self._sizes[tenant]
        return True

    def _forget_oldest(self) -> None:
        if self.bytes > self.most_bytes:
            tenant = max(self._sizes, key=self._sizes.__getitem__)
        else:
            tenant = max(self._held, key=lambda each: len(self._held[each]))
        self.forget(tenant, next(iter(self._held[tenant])))

    def _count(self, tenant: str, size: int) -> None:
        self.bytes += size
        self._sizes[tenant] = self._sizes.get(tenant, 0) + size
