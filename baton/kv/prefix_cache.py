"""PrefixCache: finds the blocks that already hold the KV of a prefix, so that it is not computed twice.
Blocks that no run holds are evictable, the least recently used first."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class PrefixCache:
    """A hash (baton/kv/prefix.py) belongs to one block, and a block has at most one hash."""

    _blocks: dict[bytes, int] = field(default_factory=dict)
    _hashes: dict[int, bytes] = field(default_factory=dict)
    evictable: dict[int, None] = field(default_factory=dict)  # oldest first

    def match(self, block_hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of the longest cached prefix of these hashes."""
        found = []
        for block_hash in block_hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def put(self, block: int, block_hash: bytes) -> None:
        """Cache a block that a run holds. No effect if block or hash are cached already."""
        if block_hash not in self._blocks and block not in self._hashes:
            self._blocks[block_hash] = block
            self._hashes[block] = block_hash

    def in_use(self, block: int) -> None:
        """A run holds the block: it cannot be evicted."""
        self.evictable.pop(block, None)

    def release(self, block: int) -> bool:
        """No run holds the block any more. True: it is evictable; False: it is not cached."""
        if block in self._hashes:
            self.evictable[block] = None
            return True
        return False

    def evict_lru(self) -> int:
        """Remove and return the least recently used block."""
        block = next(iter(self.evictable))
        del self.evictable[block]
        del self._blocks[self._hashes.pop(block)]
        return block

    def clear(self) -> list[int]:
        """Forget every hash. Returns the blocks that were evictable."""
        freed = list(self.evictable)
        self.evictable.clear()
        self._hashes.clear()
        self._blocks.clear()
        return freed

    def __len__(self) -> int:
        return len(self.evictable)

    def check(self) -> None:
        """Assert the invariants."""
        assert {block_hash: block for block, block_hash in self._hashes.items()} == self._blocks
        assert self.evictable.keys() <= self._hashes.keys()
