"""Runs: the sequences a decode worker is at work on, and who gives way when the pool is full.

A run begins with blocks for what is known of it and a few tokens more, and grows block by block. When
there is none left, the youngest run gives back all of its blocks and begins again later (preemption
by recompute); so the oldest goes on in any case, and everything that fits the pool alone gets done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.kv.blocks import BlockTable
from baton.kv.grant import Grant
from baton.kv.region import Receipt
from decode_worker.model import Draw
from sampler.params import SamplingParams


@dataclass(slots=True)
class Run:
    """A started run: all its token ids, of which the KV of the first `computed` is in the pool."""

    grant: Grant
    known: list[int]
    computed: int
    until: int  # tokens at which it ends by length
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    published: bool = False  # its prompt's blocks
    table: list[int] = field(init=False)  # its blocks, those it grew by at the end

    def __post_init__(self) -> None:
        self.table = list(self.grant.table)

    def draw(self, guessed: Sequence[int]) -> Draw:
        """How to sample what follows the known and these guessed tokens."""
        seen = self.known + list(guessed) if guessed else self.known
        return Draw(self.sampling, len(self.known) + len(guessed), seen)


@dataclass(frozen=True, slots=True)
class Arriving:
    """A started run whose KV is still on its way."""

    run: Run
    receipt: Receipt
    deadline: float


def make_room(
    runs: dict[str, Run],
    table: BlockTable,
    block_size: int,
    preempt: Callable[[str], None],
    ahead: int = 0,
) -> list[str]:
    """Blocks for the next step of every run, oldest first; a run that cannot grow takes those of the
    youngest, by `preempt`, which must take it out of `runs`; or gives up its own if it is that itself.
    While there are blocks to spare, each grows for `ahead` tokens more.

    Returns the runs that must wait: the oldest alone, while all else is held by runs to come.
    """
    waiting = []
    for name in list(runs):
        run = runs.get(name)
        if run is None:  # preempted for an older one
            continue
        while len(run.table) * block_size < len(run.known):
            block = table.grow(name)
            if block is not None:
                run.table.append(block)
                continue
            youngest = next(reversed(runs))
            if len(runs) == 1:
                waiting.append(name)
                break
            preempt(youngest)
            if youngest == name:
                break
        else:
            soon = min(len(run.known) + ahead, run.until - 1)
            while len(run.table) * block_size < soon and table.free_blocks > len(runs):
                block = table.grow(name)
                assert block is not None
                run.table.append(block)
    return waiting
