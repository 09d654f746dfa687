"""Affinity: which decode worker probably has the beginning of a prompt in its prefix cache. Pure.

The router cannot see the prefix caches. The worker to which a block hash (baton/kv/prefix.py) was sent
last is its best guess. A wrong guess costs a prefill, never a wrong answer: the worker's grant names the
cached blocks. So the memory for guesses is a table of fixed size, in which a new block takes the slot of
an old one.
"""

from array import array
from collections.abc import Sequence
from zlib import crc32

SLOTS = 1 << 18
"""Block hashes that are remembered at most; 2 MiB."""
TAG, WORKER = 6, 2  # bytes of an entry that tell blocks, and workers, apart


class Affinity:
    """The worker to which each block hash was sent last."""

    def __init__(self, slots: int = SLOTS) -> None:
        self._table = array("Q", bytes(8 * slots))
        self._workers: dict[int, tuple[str, ...]] = {}  # by their mark; seldom two have the same

    def joined(self, worker: str) -> None:
        """A worker to which blocks may be sent."""
        mark = _mark(worker)
        self._workers[mark] = (*self._workers.get(mark, ()), worker)

    def left(self, worker: str) -> None:
        """The worker and its cache are gone."""
        mark = _mark(worker)
        others = tuple(each for each in self._workers.get(mark, ()) if each != worker)
        if others:
            self._workers[mark] = others
        else:
            self._workers.pop(mark, None)

    def shares(self, block_hashes: Sequence[bytes]) -> dict[str, float]:
        """The workers that probably have the first of these blocks cached, and which share of all: what
        there() says of every worker that has joined, looked up by the block."""
        if not block_hashes:
            return {}
        slot, entry = self._entry(block_hashes[0], 0)
        mark = self._table[slot] - entry  # of the worker, if the slot holds this block
        if not 0 <= mark < 1 << 8 * WORKER:
            return {}
        return {
            worker: there / len(block_hashes)
            for worker in self._workers.get(mark, ())
            if (there := self.there(block_hashes, worker))
        }

    def sent(self, block_hashes: Sequence[bytes], worker: str) -> None:
        """A sequence that begins with these blocks was placed on this worker."""
        mark = _mark(worker)
        for block_hash in block_hashes:
            slot, entry = self._entry(block_hash, mark)
            self._table[slot] = entry

    def there(self, block_hashes: Sequence[bytes], worker: str) -> int:
        """How many of the first blocks are probably cached on this worker."""
        mark, count = _mark(worker), 0
        for block_hash in block_hashes:
            slot, entry = self._entry(block_hash, mark)
            if self._table[slot] != entry:
                break
            count += 1
        return count

    def _entry(self, block_hash: bytes, mark: int) -> tuple[int, int]:
        """The slot of a block, and what stands there if it was sent to the worker with this mark."""
        number = int.from_bytes(block_hash, "little")
        tag = number // len(self._table) % (1 << 8 * TAG)
        return number % len(self._table), tag << 8 * WORKER | mark


def _mark(worker: str) -> int:
    return crc32(worker.encode()) % (1 << 8 * WORKER)
