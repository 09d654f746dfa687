"""PrefillModel: what a prefill worker's node needs of engine and links. filling.py implements it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.wire import messages as msg


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens to compute now, for positions start, start + 1, ... of this grant's sequence."""

    grant: Grant
    token_ids: Sequence[int]
    start: int
    rope_floor: int = 0
    pooling: str = ""  # of an embedding: its hidden states are wanted, and its KV is not sent
    adapter: str = ""  # digest


@dataclass(frozen=True, slots=True)
class Sent:
    """All KV of this run is on its way."""

    run: str
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Stopped:
    """Nothing is written any more for this run, which was abandoned."""

    run: str


News = Sent | Stopped | msg.Attached | msg.AttachFailed | msg.WayLost


class PrefillModel(Protocol):
    """The node's interface to engine and links, implemented in prefill_worker/filling.py."""

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached | None:
        """Open a link to this pool, closing an older one. None: poll() will tell. TransferError if no
        transport works."""

    def detach(self, worker: str) -> None:
        """Close the link; unfinished writes are dropped."""

    def poll(self) -> Sequence[News]:
        """What became of links and fills that did not end at once. A lost link is detached."""

    @property
    def waits(self) -> bool:
        """poll() may have news soon."""

    def takes(self, worker: str) -> bool:
        """The link has room for the KV of another forward."""

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        """Reserve room to compute this sequence. False: no room now. TransferError: it can never fit, or
        the pool is not attached. `block_hashes`: of its full blocks, by which KV may be kept here."""

    def known(self, grant: Grant) -> int:
        """Tokens at the beginning whose KV is not computed again: it can be read in place, or was kept
        here. After admit(); always fewer than the sequence has."""

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        """One forward: compute the chunks' KV and write it into the granted blocks. Raises TransferError,
        and OutOfMemory; then nothing of the forward counts."""

    def finish(self, grant: Grant, tokens: int) -> Receipt | None:
        """All `tokens` are computed: make their KV visible to the owner. None: poll() will say when."""

    def embedded(self, grant: Grant) -> bytes:
        """All tokens are computed: their pooled hidden states in float32, of length 1. What was reserved
        for them is free. TransferError if they are not finite."""

    def abandon(self, grant: Grant) -> bool:
        """Stop writing under this grant. True: something may be on its way into the pool, and poll() will
        say Stopped, or that the way is lost."""

    def use_cores(self, cores: tuple[int, ...]) -> None:
        """Compute on these cores from the next forward on."""

    def clock(self) -> float:
        """Monotonic seconds, to time a forward."""
