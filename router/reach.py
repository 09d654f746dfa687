"""Reach: which prefill worker can write to which decode worker now. Pure: questions to the registry.

A prompt is filled by a prefill worker that its decode worker knew before it granted the blocks
(Entry.writers), and that is attached and accepts work. While there is none, it keeps its blocks and waits
for an attach, or is queued again: then it gets blocks that others may write to.
"""

from collections.abc import Callable

from router.candidates import Able
from router.ledger import Entry
from router.workers import DECODE, PREFILL, Member, WorkerRegistry


class Reach:
    """Between the members of a registry."""

    def __init__(self, members: WorkerRegistry) -> None:
        self._members = members

    def out_of(self, blocks: int, now: float) -> bool:
        """No prefill worker can write to a pool of so many blocks: all these ways are down. Looks for the
        first that is not, and only while a way is down."""
        members = self._members
        if not members.ways.any_down:
            return False
        fitting = [each.worker for each in members.of(DECODE) if each.hello.blocks >= blocks]
        prefills = (each for each in members.of(PREFILL) if each.accepts(now))
        return all(decode in prefill.failed for prefill in prefills for decode in fitting)

    def fillers(self, entry: Entry, now: float) -> Able:
        """Prefill workers that accept work and may write to the blocks of this entry."""
        decode, members = entry.decode, self._members

        def able(worker: str) -> Member | None:
            member = members.get(worker)
            if member is None or (worker, member.hello.epoch) not in entry.writers:
                return None
            return member if decode in member.attached and member.accepts(now) else None

        return able

    def fillable(self, now: float) -> Callable[[Entry], bool]:
        """Whether an entry has a filler now. Entries of one decode worker mostly have the same writers,
        so each answer is kept, for as long as the function is."""
        known: dict[tuple[str | None, frozenset[tuple[str, str]]], bool] = {}

        def may_be(entry: Entry) -> bool:
            alike = (entry.decode, entry.writers)
            found = known.get(alike)
            if found is None:
                able = self.fillers(entry, now)
                found = known[alike] = any(able(worker) for worker, _ in entry.writers)
            return found

        return may_be

    def lost(self, decode: str, now: float) -> bool:
        """An entry there without a filler waits for nothing: all prefill workers failed to attach, or one
        attached after its blocks were reserved."""
        prefills = self._members.alive(PREFILL, now)
        later = any(decode in prefill.attached for prefill in prefills)
        return later or (bool(prefills) and all(decode in prefill.failed for prefill in prefills))
