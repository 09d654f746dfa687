"""Waiting: when a job says what its cluster is not ready for. Pure."""

from dataclasses import dataclass

FIRST_S = 10.0
"""Most clusters are ready by then, and nobody waits to be told why."""
CHANGED_S, SAME_S = 5.0, 60.0
"""From one line to the next, if it says something else, or the same."""


@dataclass(slots=True)
class WaitingLines:
    """Of one wait."""

    _said: str = ""
    _at: float = 0.0

    def line(self, waiting_for: str, waited_s: float) -> str | None:
        """What to print now, if anything. `waiting_for`: what is missing."""
        if waited_s < FIRST_S:
            return None
        pause_s = SAME_S if waiting_for == self._said else CHANGED_S
        if self._said and waited_s - self._at < pause_s:
            return None
        self._said, self._at = waiting_for, waited_s
        return f"the cluster is not ready after {waited_s:.0f} s: {waiting_for}"
