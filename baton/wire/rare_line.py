"""RareLine: a log line that peers can provoke: at most one in some time, with the number left out."""

from dataclasses import dataclass

EVERY_S = 1.0


@dataclass(slots=True)
class RareLine:
    """Counts what happens and says which of it is worth a line. The time is an argument."""

    every_s: float = EVERY_S
    total: int = 0
    _next: float = float("-inf")
    _left_out: int = 0

    def more(self, now: float) -> str | None:
        """It happened once more. None: no line now. Else what to add to the line: how often it happened
        without one; empty if it did not."""
        self.total += 1
        if now < self._next:
            self._left_out += 1
            return None
        self._next = now + self.every_s
        left_out, self._left_out = self._left_out, 0
        return f" ({left_out:,} more since the last such line)" if left_out else ""
