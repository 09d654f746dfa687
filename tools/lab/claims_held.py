"""What a model takes in memory, dtype by dtype, and what that says about a claim. Pure."""

from dataclasses import dataclass

from baton.errors import BatonError
from baton.table import amount
from tools.lab.claims_verdict import Result


@dataclass(frozen=True, slots=True)
class Held:
    """What a model takes in one dtype. `rss_bytes` is None where nobody could read it."""

    dtype: str
    weights: int
    kv: int  # of one sequence as long as the context
    tokens: int
    rss_bytes: int | None

    @property
    def bytes(self) -> int:
        """Weights and KV."""
        return self.weights + self.kv


def rss_bytes(status: str) -> int:
    """Of /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise BatonError("/proc tells no VmRSS here")


def memory_result(key: str, full: Held, less: Held) -> Result:
    """How many times less."""
    definition = (
        f"weights + KV of one sequence of {full.tokens:,} tokens, "
        f"{full.dtype} to {less.dtype}; exact"
    )
    parts = (
        f"weights {amount(full.weights)} to {amount(less.weights)} "
        f"({full.weights / less.weights:.2f} times), KV {amount(full.kv)} to {amount(less.kv)} "
        f"({full.kv / less.kv:.2f} times)"
    )
    if full.rss_bytes and less.rss_bytes:
        parts += (
            f"; a decode worker's RSS {amount(full.rss_bytes)} to {amount(less.rss_bytes)} "
            f"({full.rss_bytes / less.rss_bytes:.2f} times: torch and Python are in there too)"
        )
    before, after = full.bytes / 1e6, less.bytes / 1e6
    return Result(key, (before / after,), before, after, "MB", definition, f"{parts}.")
