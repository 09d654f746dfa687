"""Scratch: which run holds which block of a prefill worker's own pool, and which prefixes are kept there.

Where memory is not shared, a prefill worker computes into a pool of its own and sends the KV. What it has
sent may be wanted again: the next turn of a chat begins with this one. So full blocks stay, by the hashes
of their tokens (baton/kv/prefix.py), until others need the room. Plain integers, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.kv.blocks import BlockTable

CPU_PART = 16
"""By default kept blocks take at most this part of a host's free memory: one over so much."""


def most_kept(blocks: int, block_bytes: int, free_bytes: int, *, reserved: bool) -> int:
    """How many of a pool's blocks may be kept where the user has not said it. `reserved`: its memory is
    taken in any case, as on a GPU; on a CPU each block takes memory once it is written."""
    return blocks if reserved else min(blocks, free_bytes // CPU_PART // block_bytes)


@dataclass(slots=True)
class Scratch:
    """For decode workers whose memory is not shared. At most `kept` blocks are kept of ended runs."""

    blocks: int
    kept: int = 0
    held: dict[str, list[int]] = field(default_factory=dict)  # run -> its block table
    table: BlockTable = field(init=False)
    _hashes: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    _known: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = BlockTable("scratch", "scratch", self.blocks, 0.0)

    def take(self, run: str, count: int, block_hashes: Sequence[bytes] = (), most: int = 0) -> bool:
        """Blocks for the run; False if there are not enough now. `block_hashes`: of its full blocks. The
        first `most` of them may be ones that are kept, for reading only."""
        hashes = tuple(block_hashes) if self.kept else ()
        grant = self.table.reserve(run, count, 0.0, hashes[:most])
        if grant is None:
            return False
        self.held[run], self._hashes[run] = list(grant.table), hashes
        self._known[run] = len(grant.prefix)
        return True

    def known(self, run: str) -> int:
        """How many of the run's first blocks were kept."""
        return self._known[run]

    def computed(self, run: str) -> list[int]:
        """The run's full blocks that were not kept before. Empty where nothing is kept."""
        return self.held[run][self._known[run] : len(self._hashes[run])]

    def keep(self, run: str) -> None:
        """The run's full blocks are computed, and final."""
        self.table.publish(run, self._hashes[run])

    def give_back(self, run: str) -> None:
        """The run is over, however it ended. It may have been over already."""
        if self.held.pop(run, None) is not None:
            self.table.release(run, None)
            self.table.trim(self.kept)
            del self._hashes[run], self._known[run]
