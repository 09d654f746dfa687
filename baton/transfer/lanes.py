"""Lanes: the connections of one writer to one owner of frames, side by side, and what is on its way.

Each has an I/O thread, which copies to and from the kernel, so several of them use several cores. The
owner acknowledges what it has read, whatever becomes of it. So the writer knows that the way works:

    no Ack for `deadline_s` while something is on its way     the way is lost
    the connection ends                                       the way is lost, at once

Without Acks a cut would be noticed when all buffers are full, and what is in them would be missed by
nobody. What is on its way is bounded by a window in each lane: it grows while Acks come soon, and shrinks
to about a second's worth on a slow way, so that "sent" and "arrived" are never far apart.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import parse_monitor_message

from baton.errors import TransferError
from baton.host import core_numbers
from baton.transfer.curve import login_client
from baton.transfer.frame_codec import BROKEN, PROBED, Ack, decode
from baton.transfer.sealing import Part, Seals, Ticket

TCP_LANES = 4
CONNECT_S = 5.0
WINDOW_BYTES = 32 << 20  # most bytes on their way, in all lanes
QUEUED = 64  # messages that ZeroMQ queues for a connection
SOON_S, LATE_S = 0.2, 1.0  # an Ack of this age makes the window larger, or smaller
LOOK_S = 0.1  # longest wait before a request to stop is noticed
LINGER_MS = 500
MOST_ACK_BYTES = 1 << 12
TEND_S = 0.001
"""So often send() looks for Acks while it need not wait: a look takes 50 us."""

Parts = list[Part]


@dataclass(slots=True)
class Lane:
    """One connection."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    most: int  # bytes on their way
    window: int
    seals: Seals | None = None
    sent: int = 0  # messages
    acked: int = 0
    bytes: int = 0  # on their way
    on_way: deque[tuple[float, int]] = field(default_factory=deque)  # when sent, and bytes

    @property
    def on_its_way(self) -> int:
        return self.sent - self.acked

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may be sent. At least one message may."""
        return not self.on_its_way or self.bytes + size <= self.window

    def add(self, size: int, now: float) -> None:
        """A message of so many bytes was sent."""
        self.sent += 1
        self.bytes += size
        self.on_way.append((now, size))

    def take(self, messages: int, now: float) -> bool:
        """The owner has read so many messages in all. False: it cannot have, or it is no news."""
        new = messages - self.acked
        if not 0 < new <= self.on_its_way:
            return False
        arrived = [self.on_way.popleft() for _ in range(new)]
        size = sum(each for _, each in arrived)
        self.bytes -= size
        self.acked = messages
        self.window = next_window(self.window, size, now - arrived[-1][0], self.most)
        return True


def next_window(window: int, acked: int, age_s: float, most: int) -> int:
    """The window after an Ack for so many bytes, the last of which were sent `age_s` ago. Pure."""
    if age_s <= SOON_S:
        return min(most, window + acked)
    return max(1, window // 2) if age_s >= LATE_S else window


def io_threads(lanes: int) -> int:
    """How many I/O threads a context needs for so many lanes: one each, as far as there are cores."""
    return min(lanes, max(1, len(core_numbers())))


def affinity(context: zmq.Context[zmq.Socket[bytes]], lane: int) -> int:
    """The I/O thread of a lane, as zmq.AFFINITY. By itself ZeroMQ takes the idlest when it connects:
    several connections made at once would share one."""
    return 1 << lane % int(context.get(zmq.IO_THREADS))


class Lanes:
    """Connected once. After an error nothing more can be sent: open new ones."""

    def __init__(
        self, count: int, *, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._deadline_s, self._clock = deadline_s, clock
        self._context = zmq.Context(io_threads(count))
        self._poller = zmq.Poller()
        self._progress = 0.0  # when an Ack came, or the first frame after a rest was sent
        self._tended = -TEND_S  # when Acks were looked for
        self.probed = 0  # probes that were answered
        self.stopped = ""  # why another thread wants send() to end
        self._lanes: list[Lane] = []
        most = WINDOW_BYTES // count
        for index in range(count):
            socket = self._context.socket(zmq.DEALER)
            socket.sndhwm = socket.rcvhwm = QUEUED
            socket.linger = LINGER_MS
            socket.maxmsgsize = MOST_ACK_BYTES  # the owner is not proven before an Ack opens
            socket.affinity = affinity(self._context, index)
            socket.reconnect_ivl = -1  # what was on its way is lost: the fills on it are given up
            socket.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing before the connection is up
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            monitor = socket.get_monitor_socket(events | zmq.EVENT_DISCONNECTED)
            self._poller.register(socket, zmq.POLLIN)
            self._poller.register(monitor, zmq.POLLIN)
            self._lanes.append(Lane(socket, monitor, most, most))

    def __len__(self) -> int:
        return len(self._lanes)

    def connect(self, endpoints: Sequence[str], tickets: Sequence[Ticket], within_s: float) -> None:
        """One lane to each, sealed by its ticket if there are any. Waits until the owner's I/O threads
        have accepted all. TransferError if one is refused, or `within_s` is over."""
        for lane, ticket in zip(self._lanes, tickets, strict=bool(tickets)):
            login_client(lane.socket, ticket.name, ticket.secret)
            lane.seals = Seals.of_writer(ticket)
        for lane, endpoint in zip(self._lanes, endpoints, strict=True):
            lane.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
            lane.socket.connect(endpoint)
        waiting = {id(lane.monitor) for lane in self._lanes}
        deadline = self._clock() + within_s
        while waiting:
            left = deadline - self._clock()
            if left <= 0 or self.stopped:
                raise TransferError(self.stopped or f"no answer within {within_s:g} s")
            for socket, _ in self._poller.poll(int(min(left, LOOK_S) * 1000) + 1):
                if id(socket) in waiting and self._heard(socket) == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    waiting.discard(id(socket))

    @property
    def on_its_way(self) -> int:
        """Messages that the owner has not acknowledged."""
        return sum(lane.on_its_way for lane in self._lanes)

    @property
    def quiet_since(self) -> float | None:
        """Since when no Ack has come; None if nothing is on its way."""
        return self._progress if self.on_its_way else None

    def seals(self, index: int) -> Seals | None:
        """Those of one lane; None if nothing is sealed."""
        return self._lanes[index].seals

    def marks(self) -> tuple[int, ...]:
        """How much was sent by each lane so far."""
        return tuple(lane.sent for lane in self._lanes)

    def arrived(self, marks: Sequence[int]) -> bool:
        """Everything up to these marks was acknowledged."""
        return all(lane.acked >= mark for lane, mark in zip(self._lanes, marks, strict=True))

    def send(self, parts: Parts, index: int) -> None:
        """Send one message by this lane. Waits for room in its window. TransferError if the way is
        lost."""
        lane = self._lanes[index]
        if self.stopped or self._clock() - self._tended >= TEND_S:
            self.tend()
        if lane.seals is not None:
            parts = [lane.seals.sends.close(parts[0], len(parts)), *parts[1:]]
        size, waited = sum(map(len, parts)), self._clock()
        while not lane.has_room(size) or not _sent(lane.socket, parts):
            self.tend(LOOK_S)
            if not self.on_its_way and self._clock() - waited >= self._deadline_s:
                raise self._nothing()
        now = self._clock()
        if not self.on_its_way:
            self._progress = now
        lane.add(size, now)

    def tend(self, wait_s: float = 0.0) -> None:
        """Read Acks; wait so long for the first. TransferError if the way is lost."""
        if self.stopped:
            raise TransferError(self.stopped)
        self._tended = self._clock()
        for socket, _ in self._poller.poll(int(wait_s * 1000)):
            if any(socket is lane.monitor for lane in self._lanes):
                self._heard(socket)
            else:
                self._read(next(lane for lane in self._lanes if lane.socket is socket))
        if self.on_its_way and self._clock() - self._progress >= self._deadline_s:
            raise self._nothing()

    def close(self) -> None:
        """What is queued gets half a second to leave."""
        if self._context.closed:
            return
        for lane in self._lanes:
            lane.socket.disable_monitor()
            lane.monitor.close(0)
            lane.socket.close()
        self._context.term()

    @property
    def closed(self) -> bool:
        return bool(self._context.closed)

    def _read(self, lane: Lane) -> None:
        while True:
            try:
                header: bytes | None = lane.socket.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            if lane.seals is not None and header is not None:
                header = lane.seals.receives.open(header, 1)
            if header == BROKEN:
                raise TransferError(
                    "the connection was damaged: the owner got other bytes than were sent"
                )
            match decode(header or b""):  # or it is forged
                case Ack(messages) if lane.take(messages, self._clock()):
                    self._progress = self._clock()
                case _:
                    self.probed += header == PROBED

    def _heard(self, monitor: zmq.Socket[bytes]) -> int:
        event = int(parse_monitor_message(monitor.recv_multipart())["event"])
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise TransferError("the owner refused this process's key: use its --keys folder")
        if event == zmq.EVENT_DISCONNECTED:
            raise TransferError("the connection was cut")
        return event

    def _nothing(self) -> TransferError:
        return TransferError(
            f"the owner of the KV pool received nothing for {self._deadline_s:g} s"
        )


def _sent(socket: zmq.Socket[bytes], parts: Parts) -> bool:
    try:
        socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    return True
