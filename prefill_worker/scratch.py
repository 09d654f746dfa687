"""Scratch: a prefill worker's own KV pool, and which run holds which of its blocks."""

from dataclasses import dataclass, field

from baton.engine.pool import Pool


@dataclass(slots=True)
class Scratch:
    """This worker's own pool, for decode workers whose memory is not shared."""

    pool: Pool
    free: list[int] = field(init=False)  # taken from its end, in rising order: copied as one range
    held: dict[str, list[int]] = field(default_factory=dict)  # run -> blocks

    def __post_init__(self) -> None:
        self.free = list(reversed(range(self.pool.blocks)))

    def take(self, run: str, count: int) -> bool:
        """Blocks for the run; False if there are not enough now."""
        if count > len(self.free):
            return False
        self.held[run] = [self.free.pop() for _ in range(count)]
        return True

    def give_back(self, run: str) -> None:
        self.free += reversed(self.held.pop(run, []))
