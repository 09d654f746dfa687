"""Pools of an engine: how its KV pools come to lie over memory. One process has them by itself; the ranks
of a tensor-parallel worker share them (baton/parallel/pools.py)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from baton.engine.device import allocated
from baton.engine.pool import Beside, Pool, decode_pool_blocks
from baton.kv.layout import KVLayout
from baton.kv.region import Region


class Pools(Protocol):
    """The KV pools that a worker's forwards use. What a pool's `slabs` are is what transports copy."""

    @property
    def memory(self) -> torch.device:
        """Where slabs lie."""

    def blocks(
        self, memory_bytes: int | None, max_tokens_wanted: int, beside: Beside | None
    ) -> int:
        """Blocks of a decode worker's pool: see decode_pool_blocks()."""

    def transports(self, choice: str) -> str:
        """The value of --kv-transport that these pools allow. InputError if `choice` is none of them."""

    def own(self, blocks: int) -> Pool:
        """A pool that no other worker reaches. Raises OutOfMemory."""

    def over(
        self,
        slabs: Sequence[torch.Tensor],
        blocks: int,
        region: Callable[[], Region],
        *,
        spare: bool = False,
    ) -> Pool:
        """A pool over slabs as in Pool.over(). `region`: how another process of this host maps them.
        Raises OutOfMemory, and TransferError if one cannot."""

    def arrived(self, pool: Pool, blocks: Sequence[int]) -> None:
        """Another worker has filled these blocks."""

    def drop(self, pool: Pool) -> None:
        """It is not used any more."""


class OnePool:
    """The Pools of an engine that is one process: a pool is its slabs."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        """To be made when the model is loaded, and nothing else."""
        self._layout = layout
        self.memory = device
        self._weights = allocated(device)

    def blocks(
        self, memory_bytes: int | None, max_tokens_wanted: int, beside: Beside | None
    ) -> int:
        """See Pools."""
        return decode_pool_blocks(
            self._layout, self.memory, memory_bytes, max_tokens_wanted, beside, self._weights
        )

    def transports(self, choice: str) -> str:
        """See Pools."""
        return choice

    def own(self, blocks: int) -> Pool:
        """See Pools."""
        return Pool.private(self._layout, blocks, self.memory)

    def over(
        self,
        slabs: Sequence[torch.Tensor],
        blocks: int,
        region: Callable[[], Region],
        *,
        spare: bool = False,
    ) -> Pool:
        """See Pools."""
        return Pool.over(self._layout, blocks, slabs, spare=spare)

    def arrived(self, pool: Pool, blocks: Sequence[int]) -> None:
        """Nothing: they were written to the very memory."""

    def drop(self, pool: Pool) -> None:
        """Nothing: memory is freed with its last tensor."""
