"""Node: the inside of every process. Messages in, effects out, time as an argument.

A node owns no socket, no clock and no thread, so a test can run a whole cluster of them in one
function, kill one before any message, and replay the same second twice.
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
    """Deliver Exited(peer) as soon as this process of the same host has ended."""

    peer: str
    pid: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop; the process exits with this code and, if not 0, prints why."""

    exit_code: int
    why: str


Effect = To | Watch | Stop

ROUTER = "router"
"""The router's name as a peer, seen from a worker."""


class Node(Protocol):
    """The inside of a process."""

    def handle(self, sender: str, message: Message, now: float) -> list[Effect]:
        """Take one message in."""

    def step(self, now: float) -> list[Effect]:
        """Do one unit of the node's own work (one forward, one round of planning), and keep time:
        heartbeats, deadlines. Called once a turn, after all messages that had arrived."""

    def due(self, now: float) -> float:
        """Seconds until `step` must be called again though no message comes; 0: there is work."""
