"""Kept: which prefill worker probably keeps the KV of a prompt's beginning.

Where memory is shared none does: prefill reads the prefix in the decode worker's pool. Like affinity.py
this is a guess: the worker that last filled a block, over a way that copies. A wrong one makes a
prediction wrong, never an answer. After several wrong ones in a row nothing is expected of a worker any
more, until it reuses something: it may have been told to keep nothing.
"""

from baton.rope import RopeRule
from router.affinity import Affinity
from router.hashes import prefix_hashes
from router.ledger import Entry
from router.workers import Member

MISSES = 3


class Kept:
    """By prefill worker."""

    def __init__(self, rope: RopeRule) -> None:
        self._rope = rope
        self._affinity = Affinity()
        self._misses: dict[str, int] = {}  # by worker: wrong guesses since the last right one

    def joined(self, worker: str) -> None:
        """A prefill worker."""
        self._affinity.joined(worker)

    def left(self, worker: str) -> None:
        """The worker is gone, and what it kept."""
        self._affinity.left(worker)
        self._misses.pop(worker, None)

    def hashes(self, entry: Entry, prefill: Member | None) -> tuple[bytes, ...]:
        """Those for its Fill: empty if this worker keeps nothing of it."""
        if prefill is None or not copies(prefill, entry.decode):
            return ()
        return self._hashes(entry)

    def filled(self, entry: Entry, prefill: Member, reused: int) -> None:
        """The worker has filled it, and had so many of its first tokens."""
        name, hashes = prefill.worker, self.hashes(entry, prefill)
        if self._affinity.there(hashes, name):
            self._misses[name] = 0 if reused else self._misses.get(name, 0) + 1
        self._affinity.sent(hashes, name)

    def saved(self, entry: Entry) -> dict[str, int]:
        """Tokens of the prompt that these workers need not compute."""
        hashes = self._hashes(entry)
        shares = self._affinity.shares(hashes)
        size = entry.block_size
        return {
            worker: round(share * len(hashes)) * size
            for worker, share in shares.items()
            if self._trusted(worker)
        }

    def known(self, entry: Entry, prefill: Member) -> int:
        """First tokens of the prompt that this worker would not compute."""
        if not copies(prefill, entry.decode):
            return entry.cached_tokens
        if not self._trusted(prefill.worker):
            return 0
        return self._affinity.there(self._hashes(entry), prefill.worker) * entry.block_size

    def _trusted(self, worker: str) -> bool:
        return self._misses.get(worker, 0) < MISSES

    def _hashes(self, entry: Entry) -> tuple[bytes, ...]:
        return prefix_hashes(entry, entry.block_size, self._rope)[1:]


def copies(prefill: Member, decode: str | None) -> bool:
    """Whether KV is copied on this way: memory is not shared."""
    way = prefill.attached.get(decode) if decode else None
    return way is not None and way.gb_per_s > 0
