"""Kept: which prefill worker probably keeps the KV of a prompt's beginning.

Where memory is shared none does: prefill reads the prefix in the decode worker's pool. Like affinity.py
this is a guess: the worker that was last sent a block to fill, over a way that copies. A wrong one makes
a prediction wrong, never an answer.
"""

from baton.rope import RopeRule
from router.affinity import Affinity
from router.hashes import prefix_hashes
from router.ledger import Entry
from router.workers import Member


class Kept:
    """By prefill worker."""

    def __init__(self, rope: RopeRule) -> None:
        self._rope = rope
        self._affinity = Affinity()

    def joined(self, worker: str) -> None:
        """A prefill worker."""
        self._affinity.joined(worker)

    def left(self, worker: str) -> None:
        """The worker is gone, and what it kept."""
        self._affinity.left(worker)

    def filled_by(self, entry: Entry, prefill: Member | None) -> tuple[bytes, ...]:
        """The hashes for its Fill: empty if this worker keeps nothing of it."""
        if prefill is None or not copies(prefill, entry.decode):
            return ()
        hashes = self._hashes(entry)
        self._affinity.sent(hashes, prefill.worker)
        return hashes

    def saved(self, entry: Entry) -> dict[str, int]:
        """Tokens of the prompt that these workers need not compute."""
        hashes = self._hashes(entry)
        shares = self._affinity.shares(hashes)
        size = entry.block_size
        return {worker: round(share * len(hashes)) * size for worker, share in shares.items()}

    def known(self, entry: Entry, prefill: Member) -> int:
        """First tokens of the prompt that this worker would not compute."""
        if not copies(prefill, entry.decode):
            return entry.cached_tokens
        return self._affinity.there(self._hashes(entry), prefill.worker) * entry.block_size

    def _hashes(self, entry: Entry) -> tuple[bytes, ...]:
        return prefix_hashes(entry, entry.block_size, self._rope)[1:]


def copies(prefill: Member, decode: str | None) -> bool:
    """Whether KV is copied on this way: memory is not shared."""
    way = prefill.attached.get(decode) if decode else None
    return way is not None and way.gb_per_s > 0
