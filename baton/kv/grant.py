"""Grant: leave to write into named blocks of one decode worker's pool, once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grant:
    """Blocks lent to whoever fills the run's KV cache.

    `generation` is unique within the worker's `epoch` (one boot of its process, one life of its
    pool) and never 0: it is what the blocks are stamped with once filled, so a late write under an
    old grant can be distinguished from a write under this one.
    """

    worker: str
    epoch: str
    run: str
    generation: int
    blocks: tuple[int, ...]  # to be written
    prefix: tuple[int, ...] = ()  # full blocks before them that are there already: for reading only

    @property
    def table(self) -> tuple[int, ...]:
        """The sequence's block table."""
        return self.prefix + self.blocks

    def __post_init__(self) -> None:
        if self.generation < 1:
            raise ValueError(f"generation must be at least 1, got {self.generation}")
        if len(set(self.table)) != len(self.table):
            raise ValueError(f"grant of {self.run} names a block twice")
