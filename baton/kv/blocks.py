"""BlockTable: who owns every block of one decode worker's pool. The ownership protocol, whole.

A block is in one of three hands, and goes round:

      free --- reserve ---> granted --- release(writer=None) ---> free
                               |
                               +--- release(writer=W) ---> quarantine --- W is done ---> free

* Blocks are *granted* to one run under a generation and a lease.
* `release` is the only way back, whatever ended the run. While a writer that can write by itself
  (shared memory, CUDA IPC) may still be at it, the blocks go to *quarantine* instead of the free
  list, so a late write can never land in another request's block.
* They leave quarantine when the writer says so (`writer_released`), when it is proven dead or has
  started anew (`writer_clear`). Time alone frees nothing.

Plain integers, no torch, no clock: tests explore every interleaving.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.errors import RequestError
from baton.kv.grant import Grant

ANY_WRITER = "*"
"""Quarantined for a writer we cannot name: every writer that is known must be clear first."""


@dataclass(slots=True)
class _Held:
    grant: Grant
    lease_until: float | None  # None: decoding has begun, the run holds its blocks until released


@dataclass(slots=True)
class _Quarantined:
    blocks: tuple[int, ...]
    run: str
    writers: set[str]


@dataclass(slots=True)
class BlockTable:
    """The blocks of one pool. `epoch` changes when everything is started anew."""

    worker: str
    epoch: str
    blocks: int
    lease_s: float
    writers: set[str] = field(default_factory=set)
    _free: list[int] = field(init=False)
    _held: dict[str, _Held] = field(init=False, default_factory=dict)
    _quarantine: list[_Quarantined] = field(init=False, default_factory=list)
    _generation: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._free = list(range(self.blocks - 1, -1, -1))

    # ---- taking and giving back

    def reserve(self, run: str, count: int, now: float) -> Grant | None:
        """So many blocks for the run, or None if they are not free now.

        Raises RequestError if the pool could never hold them, AssertionError if the run holds some.
        """
        assert run not in self._held, f"{run} holds blocks already"
        if count > self.blocks:
            raise RequestError(
                f"the request needs {count} KV blocks and the pool has {self.blocks}; shorten the "
                "prompt or the generation, or give the pool more memory",
                code="context_length_exceeded",
            )
        if count > len(self._free):
            return None
        self._generation += 1
        taken = tuple(self._free.pop() for _ in range(count))
        grant = Grant(self.worker, self.epoch, run, self._generation, taken)
        self._held[run] = _Held(grant, now + self.lease_s)
        return grant

    def renew(self, run: str, now: float) -> None:
        """The router still wants this grant."""
        held = self._held.get(run)
        if held is not None and held.lease_until is not None:
            held.lease_until = now + self.lease_s

    def start(self, run: str) -> Grant | None:
        """Decoding begins: the lease ends, the run holds its blocks until released.
        None if the run holds nothing (its lease ran out)."""
        held = self._held.get(run)
        if held is None:
            return None
        held.lease_until = None
        return held.grant

    def release(self, run: str, writer: str | None) -> Grant | None:
        """The one way back. `writer`: who may still write into the blocks by itself."""
        held = self._held.pop(run, None)
        if held is None:
            return None
        waiting_for = self.writers.copy() if writer == ANY_WRITER else {writer} & self.writers
        if waiting_for:
            self._quarantine.append(_Quarantined(held.grant.blocks, run, {*waiting_for}))
        else:
            self._free.extend(reversed(held.grant.blocks))
        return held.grant

    def expired(self, now: float) -> list[str]:
        """Runs whose lease is over; release them with ANY_WRITER."""
        held = self._held.items()
        return [run for run, h in held if h.lease_until is not None and now >= h.lease_until]

    # ---- what is known of the writers

    def writer_joined(self, writer: str) -> None:
        """This writer can reach the pool from now on."""
        self.writers.add(writer)

    def writer_released(self, writer: str, run: str) -> None:
        """The writer has said it does not write under this run any more."""
        self._settle(lambda held: {writer} if held.run == run else set())

    def writer_clear(self, writer: str) -> None:
        """The writer is proven dead or started anew: it writes under no old grant."""
        self.writers.discard(writer)
        self._settle(lambda held: {writer})

    def _settle(self, done: Callable[[_Quarantined], set[str]]) -> None:
        still = []
        for held in self._quarantine:
            held.writers -= done(held)
            if held.writers:
                still.append(held)
            else:
                self._free.extend(reversed(held.blocks))
        self._quarantine = still

    # ---- starting anew

    def renew_epoch(self, epoch: str) -> list[Grant]:
        """The router gave this worker up, or died: every run is over, whoever may be writing.
        Returns the grants that ended."""
        ended = [grant for run in list(self._held) if (grant := self.release(run, ANY_WRITER))]
        self.epoch = epoch
        return ended

    # ---- looking

    @property
    def free_blocks(self) -> int:
        """Blocks that can be granted now."""
        return len(self._free)

    @property
    def quarantined_blocks(self) -> int:
        """Blocks waiting for a writer to be done."""
        return sum(len(held.blocks) for held in self._quarantine)

    @property
    def idle(self) -> bool:
        """Every block is free: true after the last request of a test, or blocks have leaked."""
        return len(self._free) == self.blocks

    def check(self) -> None:
        """Every block is in exactly one hand. An assertion: what it catches is a bug of ours."""
        hands = [*self._free]
        for held in self._held.values():
            hands += held.grant.blocks
        for quarantined in self._quarantine:
            hands += quarantined.blocks
        assert sorted(hands) == list(range(self.blocks)), "a block is in two hands, or in none"
