"""Handshakes: what ZeroMQ's monitor tells about connections that a channel makes or accepts: that they
were cut, and that keys do not fit. Without a word of these a worker with wrong keys would be silent for
ever."""

import logging
from dataclasses import dataclass, field
from math import inf

import zmq
from zmq.utils.monitor import recv_monitor_message

from baton.package import spelled
from baton.wire.rare_line import RareLine

REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH  # by ZAP: the member's key is not known
DAMAGED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
"""What cannot be decrypted, in the handshake or later. Where this event is watched, libzmq 4.3 leaves the
connection as it is and reads it no more: its errno is that of the monitor's send. The Dialer replaces its
connection then. A Listener cannot replace one, so it does not watch this event: then libzmq ends the
connection at once, and the peer knows."""
ENDED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
UNREADABLE = DAMAGED | ENDED
LOST = zmq.EVENT_DISCONNECTED | REFUSED | DAMAGED
TRIES = zmq.EVENT_CONNECT_DELAYED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CONNECTED
AGREED = zmq.EVENT_HANDSHAKE_SUCCEEDED
DIALING = LOST | UNREADABLE | TRIES | AGREED
LISTENING = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | REFUSED | ENDED | AGREED
IDLE_S = 1.0
"""ZeroMQ begins to try again at once when a connection is lost, and says so. After an error of the
protocol it does not: a refused key, but also a flipped bit in an encrypted message."""
SAY_AGAIN_S = 30.0
"""ZeroMQ tries again every second; a person reads it as well every half minute."""

TO_THE_WORKER = (
    "the router at %s and this process have different keys: start this one with --keys and a copy of "
    "the folder that `python main.py keys` made for the router (without router.secret)%s"
)
TO_THE_ROUTER = (
    "a process with other keys was turned away at %s, or a message was damaged on its way: start it "
    "with --keys and a copy of this router's key folder (without router.secret)%s"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """Since the last look: a connection was lost; ZeroMQ has lost one and does not try again."""

    cut: bool
    given_up: bool


@dataclass(slots=True)
class Handshakes:
    """Watches one socket. `text`: the line for keys that do not fit, with the address and more.
    `one_peer`: it dials, so that after a handshake it is a damaged message that cannot be decrypted.
    Otherwise it listens."""

    socket: zmq.Socket[bytes]
    address: str
    text: str
    one_peer: bool
    _damage: RareLine = field(default_factory=RareLine)
    _line: RareLine = field(default_factory=lambda: RareLine(SAY_AGAIN_S))
    _monitor: zmq.Socket[bytes] = field(init=False)
    _idle_since: float = inf
    _agreed: bool = False  # the last connection's keys fit
    _strangers: set[int] = field(default_factory=set)  # accepted, and whether keys fit is not known

    def __post_init__(self) -> None:
        address = f"inproc://handshakes-{id(self)}"
        self.socket.monitor(address, DIALING if self.one_peer else LISTENING)
        self._monitor = self.socket.context.socket(zmq.PAIR)
        self._monitor.rcvhwm = 0  # else the I/O thread would wait for who does not read its events
        self._monitor.connect(address)

    def look(self, now: float) -> Seen:
        """Read what has happened, without waiting."""
        cut = False
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            seen = recv_monitor_message(self._monitor)
            event = int(seen["event"])
            turned_away = not self.one_peer and self._came_or_went(event, int(seen["value"]))
            if event & LOST:
                cut |= event != REFUSED
                self._idle_since = now
            elif event & TRIES:
                self._idle_since, self._agreed = inf, False
            self._agreed |= self.one_peer and event == AGREED
            wrong_key = event == REFUSED or (event & UNREADABLE and not self._agreed)
            if (wrong_key or turned_away) and self.address.startswith("tcp://"):
                self._say(now)
            elif event == DAMAGED and (more := self._damage.more(now)) is not None:
                logger.warning("a message from %s was damaged on its way%s", self.address, more)
        given_up = now >= self._idle_since + IDLE_S
        if given_up:
            self._idle_since = now
        return Seen(cut, given_up)

    def _came_or_went(self, event: int, descriptor: int) -> bool:
        """Whether a connection has ended before its keys fitted. ZeroMQ does not say of which connection
        a handshake has succeeded: where several are under way none is judged, and the next try is."""
        if event == zmq.EVENT_ACCEPTED:
            self._strangers.add(descriptor)
        elif event == AGREED:
            self._strangers.clear()
        elif event == zmq.EVENT_DISCONNECTED and descriptor in self._strangers:
            self._strangers.remove(descriptor)
            return True
        return False

    def _say(self, now: float) -> None:
        if (more := self._line.more(now)) is not None:
            logger.warning(spelled(self.text), self.address, more)

    def close(self) -> None:
        """Before the socket is closed."""
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
