"""Pools of a tensor-parallel worker: one pool, of which each rank reads and writes its own heads.

A pool's slabs have all heads, as with one rank, so transports, fingerprints and the other worker know
nothing of ranks, and any number of ranks may stand on each side of a hand-over.

    on CPUs   the slabs lie in shared memory; a rank's pool is a view of its heads: nothing is copied
    staged    on GPUs a rank keeps its heads on its own card, and the slabs in main memory are only what
              transports read and write: a rank copies its heads up when another worker has filled
              blocks, and down when a forward has written what is to be pushed
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from baton.engine.pool import Beside, Pool, decode_pool_blocks
from baton.errors import InputError, TransferError
from baton.kv.region import Region
from baton.kv.row import Row
from baton.parallel.boot import Booted
from baton.parallel.orders import ARRIVED, DROP, MAP, SIZE, plain_region
from baton.parallel.ranks import Ranks
from baton.parallel.team import Team
from baton.transfer.shm import open_shared, shared_region
from baton.transfer.slabs import allocate_slabs

CPU = torch.device("cpu")
STAGED = "frames"  # the transport that copies

logger = logging.getLogger(__name__)


def heads_of(pool: Pool, rank: int, ranks: int) -> Pool:
    """A view of a rank's heads, of keys and values of every layer."""

    def mine(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(each.chunk(ranks, dim=2)[rank] for each in tensors)

    return replace(pool, keys=mine(pool.keys), values=mine(pool.values))


class RankPools:
    """One rank's pools, by number."""

    def __init__(self, booted: Booted, ranks: Ranks, *, staged: bool) -> None:
        self.staged = staged
        self._booted, self._ranks = booted, ranks
        self._slabs: dict[int, Pool] = {}  # this rank's heads in the slabs
        self._pools: dict[int, Pool] = {}  # what forwards use

    def open(self, number: int, whole: Pool) -> None:
        """Take in a pool over slabs with all heads. Raises OutOfMemory."""
        self._slabs[number] = heads_of(whole, self._ranks.rank, self._ranks.size)
        self._pools[number] = (
            Pool.private(self._booted.part, whole.blocks, self._ranks.device)
            if self.staged
            else self._slabs[number]
        )

    def map(self, number: int, blocks: int, region: Region) -> None:
        """Take in a pool whose slabs another process holds, if it is still there. Raises OutOfMemory."""
        layout = self._booted.layout
        try:
            whole = Pool.over(layout, blocks, open_shared(region, layout))
        except TransferError as error:
            logger.warning("a pool cannot be mapped: %s", error)
            self.agreed(mine=False)
            return
        self.open(number, whole)
        self.agreed(mine=True)

    def agreed(self, *, mine: bool) -> bool:
        """Whether all ranks say so."""
        return bool(self._ranks.least(int(mine)))

    def size(self, memory_bytes: int | None, max_tokens_wanted: int, beside: Beside | None) -> int:
        """Blocks of a decode worker's pool that fit every rank. `memory_bytes`: of all ranks together."""
        each = None if memory_bytes is None else memory_bytes // self._ranks.size
        booted, device = self._booted, self._ranks.device
        mine = decode_pool_blocks(
            booted.part, device, each, max_tokens_wanted, beside, booted.weights
        )
        return self._ranks.least(mine)

    def of(self, number: int) -> Pool:
        """The pool for forwards."""
        return self._pools[number]

    def drop(self, number: int) -> None:
        """Forget it, if it could be mapped."""
        self._slabs.pop(number, None)
        self._pools.pop(number, None)

    def load(self, number: int, blocks: Sequence[int]) -> None:
        """Blocks have been filled in the slabs."""
        if self.staged:
            _copy(self._slabs[number], self._pools[number], blocks)

    def store(self, number: int, rows: Sequence[Row]) -> None:
        """A forward has written these rows; when this returns they are in the slabs, from every rank."""
        if not self.staged:
            return
        size = self._booted.layout.block_size
        blocks = [b for row in rows for b in row.blocks[row.start // size : -(-row.end // size)]]
        _copy(self._pools[number], self._slabs[number], blocks)
        self._ranks.wait()


def _copy(source: Pool, target: Pool, blocks: Sequence[int]) -> None:
    index = torch.tensor(list(blocks), dtype=torch.int64)
    there, here = index.to(source.device), index.to(target.device)
    for ours, theirs in ((target.keys, source.keys), (target.values, source.values)):
        for layer, some in zip(ours, theirs, strict=True):
            layer.index_copy_(0, here, some.index_select(0, there).to(layer.device))


class SharedPools:
    """The Pools of the first rank (baton/engine/pools.py), which tells the others of each."""

    def __init__(self, booted: Booted, ranks: Ranks, team: Team, *, staged: bool) -> None:
        self.memory = CPU
        self.mine = RankPools(booted, ranks, staged=staged)
        self._layout = booted.layout
        self._team = team
        self._numbers: dict[int, int] = {}  # by the address of the first slab
        self._opened = 0

    def blocks(
        self, memory_bytes: int | None, max_tokens_wanted: int, beside: Beside | None
    ) -> int:
        """See Pools. Staged, the slabs in main memory have room for as many blocks as all cards."""
        staged = self.mine.staged
        blocks = decode_pool_blocks(self._layout, CPU, None if staged else memory_bytes,
                                    max_tokens_wanted, None)  # fmt: skip
        if not staged:
            return blocks
        together = (beside.prefills, beside.decodes) if beside is not None else None
        self._team.order(SIZE, memory_bytes, max_tokens_wanted, together)
        return min(blocks, self.mine.size(memory_bytes, max_tokens_wanted, beside))

    def transports(self, choice: str) -> str:
        """See Pools. Staged, a writer must not compute in the slabs, which the cards do not read."""
        if not self.mine.staged:
            return choice
        if choice not in ("auto", STAGED):
            raise InputError(
                f"--kv-transport {choice} does not go with several ranks on GPUs: use {STAGED} or auto"
            )
        return STAGED

    def number(self, pool: Pool) -> int:
        """By which the ranks know a pool that was made here."""
        return self._numbers[pool.slabs[0].data_ptr()]

    def own(self, blocks: int) -> Pool:
        """See Pools. The memory is shared among the ranks."""
        slabs = allocate_slabs(self._layout, blocks, CPU, shared=True)
        return self.over(slabs.tensors, blocks, lambda: shared_region("shm", slabs, ""))

    def over(
        self,
        slabs: Sequence[torch.Tensor],
        blocks: int,
        region: Callable[[], Region],
        *,
        spare: bool = False,
    ) -> Pool:
        """See Pools."""
        pool = Pool.over(self._layout, blocks, slabs, spare=spare)
        self._opened += 1
        self._numbers[slabs[0].data_ptr()] = self._opened
        self._team.order(MAP, self._opened, blocks, plain_region(region()))
        self.mine.open(self._opened, pool)
        if not self.mine.agreed(mine=True):
            self.drop(pool)
            raise TransferError(
                "another rank of this worker cannot map the pool: its owner is gone"
            )
        return pool

    def arrived(self, pool: Pool, blocks: Sequence[int]) -> None:
        """See Pools."""
        if self.mine.staged and blocks:
            self._team.order(ARRIVED, self.number(pool), list(blocks))
            self.mine.load(self.number(pool), blocks)

    def drop(self, pool: Pool) -> None:
        """See Pools."""
        number = self._numbers.pop(pool.slabs[0].data_ptr())
        self._team.order(DROP, number)
        self.mine.drop(number)
