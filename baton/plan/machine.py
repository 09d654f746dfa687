"""Machine: how long forwards take, for the simulation. Pure.

    seconds = forward_s + row_s for each stream + token_s for each prompt token, by its position

Workers with devices of their own are as fast as they are. Workers that share the `cores` of one host
compute on those that the router hands out: `forward_power` and `token_power` say how much faster more of
them are (1: twice as fast on twice as many, 0: no faster).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.kv.row import Row
from baton.pace import CONTEXT, Pace


@dataclass(frozen=True, slots=True)
class Machine:
    """`forward_s`, `row_s` and `token_s` are those on all cores. `kv_bytes_per_s`: of a hand-over; 0:
    memory is shared. `hop_s`: what a message between two processes takes."""

    forward_s: float
    token_s: float
    row_s: float = 0.0
    context: float = CONTEXT  # tokens after which another takes twice as long
    cores: int = 0  # shared by all workers; 0: each has a device of its own
    forward_power: float = 0.5
    token_power: float = 1.0
    kv_bytes_per_token: int = 1 << 16
    kv_bytes_per_s: float = 0.0
    hop_s: float = 0.0005

    def __post_init__(self) -> None:
        if min(self.forward_s, self.token_s) <= 0 or min(self.row_s, self.hop_s) < 0:
            raise ValueError(f"times must be positive: {self}")

    def forward(self, chunks: Sequence[tuple[int, int]], streams: int, cores: int) -> float:
        """Seconds of one forward with prompt chunks (first position, tokens) and so many streams."""
        share = cores / self.cores if self.cores and cores else 1.0
        tokens = sum(n * (1 + (start + n / 2) / self.context) for start, n in chunks)
        seconds: float = (self.forward_s + streams * self.row_s) / share**self.forward_power
        seconds += tokens * self.token_s / share**self.token_power
        return seconds

    def rows(self, rows: Sequence[Row], cores: int) -> float:
        """Seconds of a decode worker's forward."""
        chunks = [(row.start, len(row.token_ids)) for row in rows if len(row.token_ids) > 1]
        return self.forward(chunks, len(rows) - len(chunks), cores)

    def handover(self, tokens: int) -> float:
        """Seconds that pushing the KV of so many tokens adds to a fill."""
        return (
            tokens * self.kv_bytes_per_token / self.kv_bytes_per_s if self.kv_bytes_per_s else 0.0
        )

    def boot(self, workers: int) -> tuple[Pace, int]:
        """What a worker measures at its start, and on how many cores: its share of them."""
        share = max(1, self.cores // workers) if self.cores else 0
        one = self.forward([(0, 1)], 0, share)
        return Pace.measured(one, self.forward([(0, 16)], 0, share), 16), share
