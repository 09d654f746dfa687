"""Node: the logic of a process. Messages in, effects out, time as an argument.

A node owns no socket, clock or thread. So a test can run a whole cluster in one function, kill a worker
before any message, and repeat a run exactly.
"""

from dataclasses import dataclass
from typing import Protocol

from baton.wire.messages import Message


@dataclass(frozen=True, slots=True)
class To:
    """Send this message to that peer."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Watch:
    """Deliver Exited(peer) as soon as this process on the same host has ended."""

    peer: str
    pid: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process with this exit code; print `why` if it is not empty."""

    exit_code: int
    why: str


Effect = To | Watch | Stop

ROUTER = "router"
"""The router's name as a peer, seen from a worker."""


class Node(Protocol):
    """The logic of a process."""

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        """Handle one message."""

    def step(self, now: float) -> list[Effect]:
        """Do one unit of work (one forward, one round of planning) and what time requires: heartbeats,
        deadlines. Called once a turn, after all messages that had arrived."""

    def due(self, now: float) -> float:
        """Seconds until `step` must be called even if no message arrives; 0: there is work."""
