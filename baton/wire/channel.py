"""Channels: the sockets under the loop. The router listens; workers and clients dial.

Messages of one send() arrive together, as the frames of one ZeroMQ message: no peer handles some of them
one step before the others.

Sending to a peer that is gone is an error (ROUTER_MANDATORY). Nothing is queued for a router that is not
connected (IMMEDIATE), so a new router never gets messages meant for the old one.
"""

import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import zmq
from zmq.auth.thread import ThreadAuthenticator

from baton.clock import Clock, monotonic
from baton.errors import InputError, ProtocolError
from baton.package import COMMAND
from baton.wire.codec import MAX_MESSAGE_BYTES, decode, decode_malformed, encode
from baton.wire.handshakes import TO_THE_ROUTER, TO_THE_WORKER, Handshakes
from baton.wire.keys import ClusterKeys
from baton.wire.messages import ClusterInfo, Heartbeat, Message, Observed, Unreachable
from baton.wire.node import ROUTER
from baton.wire.rare_line import RareLine

WAITING_MESSAGES = 100_000
"""Most messages that ZeroMQ queues for one peer; a peer with more counts as gone."""
HEARTBEAT_MS, SILENT_MS = 2000, 10_000
"""ZeroMQ's own: a connection without an answer for so long is half open, and ended.

Only the dialing end asks. The listening one ends a connection on which nothing has come for SILENT_MS
since it was asked. If it asked, too, it would abort (libzmq 4.3.5, `!_io_error`): a peer that connects
again takes its name away from the old connection, nobody reads that any more, and when its other end
is closed, the next heartbeat is written to a connection that is already given up."""
BROADCAST = (ClusterInfo, Heartbeat, Observed)
"""Messages of which one goes to many peers: it is packed once."""

logger = logging.getLogger(__name__)


class Channel(Protocol):
    """What the loop needs of a socket."""

    socket: zmq.Socket[bytes]

    def send(self, peer: str, *messages: Message) -> bool:
        """False: the peer is not there, and none of them was sent."""

    def receive(self) -> Iterator[tuple[str, list[Message]]]:
        """Everything that has arrived: a sender and what it sent together. Malformed ones are counted.
        It becomes Malformed where its sender can be answered, else all of them are dropped."""

    def close(self) -> None: ...


def check_address(address: str, keys: ClusterKeys | None) -> None:
    """InputError unless it is ipc, or tcp with keys."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        return
    if scheme != "tcp" or not rest:
        raise InputError(f"the address must be ipc://PATH or tcp://HOST:PORT, got {address!r}")
    if keys is None:
        raise InputError(
            f"{address} uses tcp, which needs keys: make them with `{COMMAND} keys DIR` "
            "and pass --keys DIR to every process"
        )


class Listener:
    """The router's end: many peers, by name."""

    def __init__(
        self, address: str, keys: ClusterKeys | None = None, *, clock: Clock = monotonic
    ) -> None:
        check_address(address, keys)
        _check_bind(address)
        self._context = zmq.Context()
        self._guard: ThreadAuthenticator | None = None
        self._clock = clock
        self._reader = _Reader(clock)
        self._packed: dict[type, tuple[Message, bytes]] = {}  # the last broadcast of each kind
        self.socket = self._context.socket(zmq.ROUTER)
        _common_options(self.socket)
        self.socket.router_mandatory = True
        self.socket.router_handover = True  # a peer that reconnects replaces its old connection
        if keys is not None and address.startswith("tcp://"):
            self._secure(keys)
        self._handshakes = Handshakes(self.socket, address, TO_THE_ROUTER, one_peer=False)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise InputError(f"cannot listen on {address}: {error.strerror}") from error

    def _secure(self, keys: ClusterKeys) -> None:
        if keys.router_secret is None:
            raise InputError("the router needs router.secret in its key folder; it is not there")
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(credentials_provider=_MemberKeys(keys.member_public))
        self.socket.curve_server = True
        self.socket.curve_secretkey = keys.router_secret
        self.socket.curve_publickey = keys.router_public

    @property
    def malformed(self) -> int:
        """Messages refused so far."""
        return self._reader.refused.total

    @property
    def address(self) -> str:
        """Where it listens, with a wildcard port resolved."""
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: str, *messages: Message) -> bool:
        try:
            self.socket.send_multipart([peer.encode(), *map(self._pack, messages)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _pack(self, message: Message) -> bytes:
        if not isinstance(message, BROADCAST):
            return encode(message)
        last = self._packed.get(type(message))
        if last is None or last[0] is not message:
            last = self._packed[type(message)] = (message, encode(message))
        return last[1]

    def receive(self) -> Iterator[tuple[str, list[Message]]]:
        self._handshakes.look(self._clock())
        while _readable(self.socket):
            frames = self.socket.recv_multipart(zmq.DONTWAIT)
            sender = frames[0].decode("utf-8", "replace")
            if messages := self._reader.read(frames[1:], sender):
                yield sender, messages

    def close(self) -> None:
        if self._guard is not None:
            self._guard.stop()
        self._handshakes.close()
        self.socket.close(linger=0)
        self._context.destroy(linger=0)


class Dialer:
    """A worker's or a client's end: one peer, the router."""

    def __init__(
        self,
        name: str,
        address: str,
        keys: ClusterKeys | None = None,
        *,
        clock: Clock = monotonic,
    ) -> None:
        check_address(address, keys)
        self._address, self._clock = address, clock
        self._reader = _Reader(clock)
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        _common_options(self.socket)
        self._handshakes = Handshakes(self.socket, address, TO_THE_WORKER, one_peer=True)
        self.socket.identity = name.encode()
        self.socket.heartbeat_ivl, self.socket.heartbeat_timeout = HEARTBEAT_MS, SILENT_MS
        self.socket.heartbeat_ttl = SILENT_MS
        self.socket.immediate = True
        self.socket.reconnect_ivl = 50
        self.socket.reconnect_ivl_max = 1000
        if keys is not None and address.startswith("tcp://"):
            self.socket.curve_serverkey = keys.router_public
            self.socket.curve_publickey = keys.member_public
            self.socket.curve_secretkey = keys.member_secret
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise InputError(f"cannot connect to {address}: {error.strerror}") from error

    @property
    def malformed(self) -> int:
        """Messages refused so far."""
        return self._reader.refused.total

    def send(self, peer: str, *messages: Message) -> bool:
        assert peer == ROUTER, f"only the router can be reached, not {peer}"
        try:
            self.socket.send_multipart([encode(message) for message in messages], zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[tuple[str, list[Message]]]:
        if self._was_cut():
            yield ROUTER, [Unreachable(ROUTER)]
        while _readable(self.socket):
            frames = self.socket.recv_multipart(zmq.DONTWAIT)
            if messages := self._reader.read(frames, ROUTER):
                yield ROUTER, messages

    def _was_cut(self) -> bool:
        """Whether the connection was lost since the last call, and with it the messages in flight, even
        if ZeroMQ has reconnected. Where it does not try to, this does."""
        seen = self._handshakes.look(self._clock())
        if seen.given_up:
            with suppress(zmq.ZMQError):  # ZeroMQ has forgotten the address already
                self.socket.disconnect(self._address)
            self.socket.connect(self._address)
        return seen.cut

    def close(self, *, linger_s: float = 0.0) -> None:
        """`linger_s`: time limit for sending queued messages."""
        self._handshakes.close()
        self.socket.close(linger=int(linger_s * 1000))
        self._context.term()


class _MemberKeys:
    """zmq.auth's credentials provider: holders of the member key may connect."""

    def __init__(self, member_public: bytes) -> None:
        self._member_public = member_public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._member_public


def _common_options(socket: zmq.Socket[bytes]) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = WAITING_MESSAGES
    socket.maxmsgsize = MAX_MESSAGE_BYTES + 1024  # on the wire, including CURVE's overhead


def _readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a whole message waits. A poll would take ten times as long."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class _Reader:
    """Frames to messages. Malformed ones are counted, and logged once a second at most: a peer that sends
    noise fills no disk."""

    def __init__(self, clock: Clock) -> None:
        self.refused = RareLine()
        self._clock = clock

    def read(self, frames: Sequence[bytes], sender: str) -> list[Message]:
        """The messages in these frames, one in each. See Channel.receive for malformed ones."""
        messages: list[Message] = []
        for frame in frames:
            try:
                messages.append(decode(frame))
            except ProtocolError as error:
                malformed = decode_malformed(frame, error)
                did = "dropped" if malformed is None else "refused"
                if (more := self.refused.more(self._clock())) is not None:
                    line = "%s a malformed message from %r: %s%s"
                    logger.warning(line, did, sender[:80], error, more)
                if malformed is None:
                    return []
                messages.append(malformed)
        return messages


def _check_bind(address: str) -> None:
    """InputError for tcp on every interface, and for ipc in a folder that other users can enter."""
    scheme, _, rest = address.partition("://")
    if scheme == "tcp" and _is_everywhere(rest.rsplit(":", 1)[0]):
        raise InputError(f"{address} listens on every interface: name the address to listen on")
    if scheme == "ipc":
        folder = Path(rest).parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(folder.stat().st_mode)
        except OSError as error:
            raise InputError(f"cannot use {folder} for sockets: {error.strerror}") from error
        if mode & 0o077 or folder.stat().st_uid != os.getuid():
            raise InputError(
                f"{folder} is open to other users (mode {mode:04o}), and so would be the router's "
                f"socket in it: use a folder of mode 0700, e.g. `mkdir -m 700 {folder}/baton`"
            )
        if _is_listening(rest):
            raise InputError(f"cannot listen on {address}: Address already in use")
        if len(rest.encode()) > 100:
            raise InputError(
                f"ipc path of {len(rest)} characters, the system allows about 100: {rest}"
            )


def _is_everywhere(host: str) -> bool:
    if host in ("*", ""):
        return True
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except OSError:
        return False  # bind will report the error
    return any(ipaddress.ip_address(address[4][0]).is_unspecified for address in found)


def _is_listening(path: str) -> bool:
    """A second bind on an ipc path would silently take over the socket of the first."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
