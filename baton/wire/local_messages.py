"""Messages of the event loop (loop.py) and the channel (channel.py) to their own node. They are never
sent: the codec refuses them from a socket."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exited:
    """From the loop itself, never sent: the peer's process has ended."""

    peer: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """From the loop itself, never sent: a message could not be delivered. The peer may be alive."""

    peer: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """From the channel, never sent: a Submit or Hello arrived that cannot be read. `about` is its request
    id or its protocol, `why` the rule it breaks."""

    kind: str
    about: str
    why: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """From the loop itself, never sent: SIGTERM came; end within so many seconds."""

    within_s: float
