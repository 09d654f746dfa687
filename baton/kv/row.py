"""Row: consecutive tokens of one sequence for the next forward. The engine's input, in integers."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Logits(StrEnum):
    """Which positions of a row need logits."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


class Row(NamedTuple):
    """Run `token_ids` as positions start, start + 1, ... of a sequence whose first `start` tokens
    have their KV in `blocks` already.

    `blocks` is the sequence's block table: position p is in blocks[p // block_size]. It covers at least
    start + len(token_ids) positions; further blocks are not read.
    Decode is a row of one token, prefill a row of many, chunked prefill a row with start > 0.
    `rope_floor`: the least rope length of its tokens (baton/rope.py). It matters for few models.
    `adapter`: the digest of the adapter that is applied to it (baton/adapters/); empty: none.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: Logits = Logits.NONE
    rope_floor: int = 0
    adapter: str = ""

    @property
    def end(self) -> int:
        """Tokens whose KV is in the pool once this row has run."""
        return self.start + len(self.token_ids)
