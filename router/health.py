"""Health: from heartbeats to alive, suspect, dead. Pure: time is an argument.

A worker sends heartbeats from its step loop, so a wedged process falls silent though its sockets still
answer. It may be silent for as long as its longest step takes (`patience_s` of its Hello); queueing is
never counted. The death of a process on the router's own host is noticed at once by other means (Exited);
this judges what cannot be watched: other hosts, stalled and wedged processes.
"""

from dataclasses import dataclass
from enum import StrEnum

BEAT_S = 1.0
MISSED_BEATS = 3


class Health(StrEnum):
    """Verdict on a worker."""

    ALIVE = "alive"
    SUSPECT = "suspect"  # silent for too long: gets no new requests
    DEAD = "dead"  # silent for longer than its longest step: its requests are moved


@dataclass(slots=True)
class Pulse:
    """When a worker was last heard, and how long it may be silent."""

    last_heard: float
    patience_s: float

    def silent_s(self, now: float) -> int:
        """Whole seconds since it was last heard."""
        return int(now - self.last_heard)

    def judge(self, now: float) -> Health:
        """The verdict now."""
        silent = now - self.last_heard
        if silent >= MISSED_BEATS * BEAT_S + self.patience_s:
            return Health.DEAD
        return Health.SUSPECT if silent >= MISSED_BEATS * BEAT_S else Health.ALIVE
