"""Affinity: which decode worker probably has the beginning of a prompt in its prefix cache. Pure.

The router cannot see the prefix caches. The worker to which a block hash (baton/kv/prefix.py) was sent
last is its best guess. A wrong guess costs a prefill, never a wrong answer: the worker's grant names the
cached blocks.
"""

from collections import OrderedDict
from collections.abc import Sequence

REMEMBERED = 100_000
"""Block hashes; about 10 MB."""


class Affinity:
    """The worker to which each block hash was sent last."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._places: OrderedDict[bytes, str] = OrderedDict()

    def sent(self, block_hashes: Sequence[bytes], worker: str) -> None:
        """A sequence that begins with these blocks was placed on this worker."""
        for block_hash in block_hashes:
            self._places[block_hash] = worker
            self._places.move_to_end(block_hash)
        while len(self._places) > self._remembered:
            self._places.popitem(last=False)

    def there(self, block_hashes: Sequence[bytes], worker: str) -> int:
        """How many of the first blocks are probably cached on this worker."""
        count = 0
        for block_hash in block_hashes:
            if self._places.get(block_hash) != worker:
                break
            count += 1
        return count
