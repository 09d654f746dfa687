"""Grant: permission to write, once, into named blocks of one decode worker's pool."""

from dataclasses import dataclass

from baton.bounds import BlockIds, Count, Name, RunName


@dataclass(frozen=True, slots=True)
class Grant:
    """`generation` is unique within the worker's `epoch` and never 0. Filled blocks are stamped with it,
    so a late write under an old grant can be distinguished from a write under this one."""

    worker: Name
    epoch: Name
    run: RunName
    generation: Count
    blocks: BlockIds  # to be written
    prefix: BlockIds = ()  # cached blocks before them, read-only

    @property
    def table(self) -> tuple[int, ...]:
        """The sequence's block table."""
        return self.prefix + self.blocks

    def __post_init__(self) -> None:
        if self.generation < 1:
            raise ValueError(f"generation must be at least 1, got {self.generation}")
        if len(set(self.table)) != len(self.table):
            raise ValueError(f"grant of {self.run} names a block twice")
