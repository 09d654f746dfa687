"""BlockTable: the owner of every block of one decode worker's pool. The whole ownership protocol.

      free --- reserve ---> held --- release(writer=None) ---> free, or cached if it has a hash
                             |
                             +--- release(writer=W) ---> quarantine --- W has stopped ---> free

* Blocks are *granted* to one run under a generation and a lease; only the run's writer writes them.
* A run that decodes may *grow*, block by block; only the run itself writes those blocks.
* A full block whose run has begun to decode may be *published* under the hash of its tokens
  (baton/kv/prefix.py). It is never written again, other runs may hold it too, and when none does it
  stays *cached* until a reservation evicts it (least recently used first).
* `release` is the only operation that frees blocks, however the run ended. While a writer that writes
  to the pool directly (shared memory, CUDA IPC) may still be writing, its blocks go to *quarantine*
  first, so a late write can never land in another request's block. Its prefix goes there too, for
  such a writer reads it.
* They leave quarantine when the writer confirms that it has stopped (`writer_released`), is proven dead,
  has restarted or was shut out (`writer_clear`). No timeout frees a block.

Plain integers, no torch, no clock: tests explore every interleaving.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from baton.errors import RequestError
from baton.kv.grant import Grant
from baton.kv.prefix_cache import PrefixCache

ANY_WRITER = "*"
"""The writer is unknown: quarantine ends when all writers that can reach the pool have stopped."""


@dataclass(slots=True)
class _Held:
    grant: Grant
    lease_until: float | None  # None: started, it holds its blocks until released
    grown: tuple[int, ...] = ()

    @property
    def table(self) -> tuple[int, ...]:
        return self.grant.table + self.grown


@dataclass(slots=True)
class _Quarantined:
    blocks: tuple[int, ...]
    run: str
    writers: set[str]


@dataclass(slots=True)
class BlockTable:
    """The blocks of one pool. `epoch` names one life of the worker."""

    worker: str
    epoch: str
    blocks: int
    lease_s: float
    writers: set[str] = field(default_factory=set)
    _free: list[int] = field(init=False)
    _cache: PrefixCache = field(init=False, default_factory=PrefixCache)
    _holders: Counter[int] = field(init=False, default_factory=Counter)  # runs and quarantines
    _held: dict[str, _Held] = field(init=False, default_factory=dict)
    _quarantine: list[_Quarantined] = field(init=False, default_factory=list)
    _generation: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._free = list(range(self.blocks - 1, -1, -1))

    # ---- taking and giving back

    def reserve(
        self, run: str, count: int, now: float, block_hashes: Sequence[bytes] = ()
    ) -> Grant | None:
        """`count` blocks for the run, or None if too few are free. `block_hashes` are those of its first
        blocks; cached ones become the grant's prefix, for reading only. RequestError if the pool could
        never hold them."""
        assert run not in self._held, f"{run} holds blocks already"
        if count > self.blocks:
            raise RequestError(
                f"the request needs {count} KV blocks and the pool has {self.blocks}; shorten the "
                "prompt or the generation, or give the pool more memory",
                code="context_length_exceeded",
            )
        prefix = self._cache.match(block_hashes[:count])
        cached = sum(not self._holders[block] for block in prefix)  # they stop being free
        if count - len(prefix) > self.free_blocks - cached:
            return None
        self._hold(prefix)
        taken = [self._take() for _ in range(count - len(prefix))]
        self._hold(taken)
        self._generation += 1
        grant = Grant(self.worker, self.epoch, run, self._generation, tuple(taken), prefix)
        self._held[run] = _Held(grant, now + self.lease_s)
        return grant

    def holds(self, run: str) -> bool:
        """The run has blocks."""
        return run in self._held

    def renew(self, run: str, now: float) -> None:
        """Extend the lease of a grant that is not started."""
        held = self._held.get(run)
        if held is not None and held.lease_until is not None:
            held.lease_until = now + self.lease_s

    def start(self, run: str) -> Grant | None:
        """End the lease: the run holds its blocks until released. None if it holds none."""
        held = self._held.get(run)
        if held is None:
            return None
        held.lease_until = None
        return held.grant

    def grow(self, run: str) -> int | None:
        """Add a block to a started run's table; None if none is free."""
        held = self._held[run]
        assert held.lease_until is None, f"{run} grows before it was started"
        if not self.free_blocks:
            return None
        block = self._take()
        self._hold([block])
        held.grown += (block,)
        return block

    def publish(self, run: str, block_hashes: Sequence[bytes]) -> None:
        """Cache the run's first blocks under these hashes: they are full and final."""
        for block, block_hash in zip(self._held[run].table, block_hashes, strict=False):
            self._cache.put(block, block_hash)

    def release(self, run: str, writer: str | None) -> Grant | None:
        """Free the run's blocks. `writer` may still be writing into the granted ones.

        A run that is released again, after its lease ended or the epoch did, tells which writer its
        blocks in quarantine wait for: this one, or none."""
        held = self._held.pop(run, None)
        if held is None:
            if writer != ANY_WRITER:
                self._settle(lambda each: each.writers - {writer} if each.run == run else set())
            return None
        waiting_for = self.writers.copy() if writer == ANY_WRITER else {writer} & self.writers
        if waiting_for:
            self._quarantine.append(_Quarantined(held.grant.table, run, {*waiting_for}))
            self._let_go(held.grown)
        else:
            self._let_go(held.table)
        return held.grant

    def trim(self, most: int) -> None:
        """Free cached blocks, the least recently used first, until at most so many are left."""
        while len(self._cache) > most:
            self._free.append(self._cache.evict_lru())

    def expired(self, now: float) -> list[str]:
        """Runs whose lease is over; release them with ANY_WRITER."""
        held = self._held.items()
        return [run for run, h in held if h.lease_until is not None and now >= h.lease_until]

    def _take(self) -> int:
        return self._free.pop() if self._free else self._cache.evict_lru()

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._holders[block] += 1
            self._cache.in_use(block)

    def _let_go(self, blocks: Sequence[int]) -> None:
        """In reverse order: the end of a cached sequence is evicted before its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if not self._cache.release(block):
                    self._free.append(block)

    # ---- writers

    def writer_joined(self, writer: str) -> None:
        """This writer can write to the pool from now on."""
        self.writers.add(writer)

    def writer_released(self, writer: str, run: str) -> None:
        """The writer has stopped writing for this run."""
        self._settle(lambda held: {writer} if held.run == run else set())

    def writer_clear(self, writer: str) -> None:
        """The writer is dead, has restarted or was shut out: it writes under no old grant."""
        self.writers.discard(writer)
        self._settle(lambda held: {writer})

    def _settle(self, done: Callable[[_Quarantined], set[str]]) -> None:
        still = []
        for held in self._quarantine:
            held.writers -= done(held)
            if held.writers:
                still.append(held)
            else:
                self._let_go(held.blocks)
        self._quarantine = still

    # ---- a new epoch

    def renew_epoch(self, epoch: str) -> list[Grant]:
        """End every run and empty the cache. Returns the grants that ended."""
        self._free += self._cache.clear()
        ended = [grant for run in list(self._held) if (grant := self.release(run, ANY_WRITER))]
        self.epoch = epoch
        return ended

    # ---- state

    @property
    def free_blocks(self) -> int:
        """Blocks that can be granted now, cached ones included."""
        return len(self._free) + len(self._cache)

    @property
    def cached_blocks(self) -> int:
        """Free blocks that are in the prefix cache."""
        return len(self._cache)

    @property
    def quarantined_blocks(self) -> int:
        """Blocks that wait until a writer has stopped."""
        return len({block for held in self._quarantine for block in held.blocks})

    @property
    def idle(self) -> bool:
        """Every block is free. False after the last request means a leak."""
        return self.free_blocks == self.blocks

    def check(self) -> None:
        """Assert that every block is free, cached, or held as often as counted."""
        found: Counter[int] = Counter()
        for held in self._held.values():
            found.update(held.table)
        for quarantined in self._quarantine:
            found.update(quarantined.blocks)
        assert found == self._holders, "the count of holders is wrong"
        blocks = [*self._free, *self._cache.evictable, *found]
        assert sorted(blocks) == list(range(self.blocks)), "a block has two owners, or none"
        self._cache.check()
