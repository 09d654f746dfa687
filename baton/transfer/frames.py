"""Frames: KV bytes as ZeroMQ messages. Works everywhere; over tcp both sides are authenticated, and what
they send is sealed (sealing.py).

The owner writes each piece into the pool as it arrives. The blocks are granted but not stamped, so
no other run reads them. When the End agrees with what was counted and hashed, the blocks are
stamped. The pieces of a lane must arrive in order. Anything else is dropped and counted by reason:

    junk       not a valid message                   epoch      from another epoch of this pool
    unknown    no such grant (retired, never made)   repeated   a sequence number seen before
    gap        an earlier piece is missing           late       after the End
    layer, blocks, size   outside the grant or the layout; lane: not the one of its layer
    digest, total, unfilled   the End contradicts what arrived          seal: the payload does not open
    lost       nothing came any more              forged     not what its writer sealed next

Every reason but junk, forged, epoch, unknown, repeated and late also makes the grant BAD; gap and lost
make it LOST. What was read, and is not forged, is acknowledged, whatever became of it: the writer learns
that the way works (lanes.py).
"""

import contextlib
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import zmq

from baton.bounds import Plain
from baton.errors import TransferError
from baton.host import host_id
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.base import Owner
from baton.transfer.crc import crc32
from baton.transfer.curve import login_server
from baton.transfer.frame_codec import BROKEN, PROBED, Ack, End, Piece, Probe, decode, largest_frame
from baton.transfer.frames_link import FramesLink
from baton.transfer.gate import Gate
from baton.transfer.lanes import TCP_LANES, affinity, io_threads
from baton.transfer.packing import Places
from baton.transfer.pieces import all_rows, block_bytes, scatter
from baton.transfer.sealing import SEAL_BYTES, Part, Seals, Tickets
from baton.transfer.slabs import Slabs, private_folder
from baton.transfer.stamps import Digest, Expected, joined, lacking, pack_blocks
from baton.wire.rare_line import RareLine

POLL_BYTES = 8 << 20
WAITING_FRAMES = 32  # of each connection
POLL_MESSAGES = 256
PATIENCE_S = 10.0
ABANDONED_S = 1.0
MOST_PARTS = 2
MAX_CONNECTIONS = 16_384
"""Connections whose messages are counted; those that were silent for longest are forgotten."""
WAY = ("gap", "lost")
"""Reasons for which the way is at fault."""

logger = logging.getLogger(__name__)


def remove_abandoned(folder: Path, now: float) -> None:
    """Remove the KV sockets of this folder at which nobody listens: those of killed decode workers. One
    younger than ABANDONED_S may be about to listen. `now`: seconds since the epoch."""
    for path in folder.glob("kv-*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if now - path.stat().st_mtime < ABANDONED_S:
                continue
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


@dataclass(slots=True)
class _Connection:
    sealed: bool  # within the host nothing is
    seals: Seals | None  # None though it is sealed: it has been forgotten
    read: int = 0  # messages
    broken: bool = False  # something forged came

    def open(self, header: Part, parts: int) -> bytes | None:
        """The header of a message of so many parts; None if it is forged."""
        if not self.sealed:
            return bytes(header)
        return self.seals.receives.open(header, parts) if self.seals is not None else None

    def close(self, header: bytes) -> bytes:
        """A header to be sent, the only part of its message."""
        return self.seals.sends.close(header, 1) if self.seals is not None else header


@dataclass(slots=True)
class _Lane:
    digest: Digest
    expected: int = 0  # the next sequence number
    moved: int = 0
    ended: bool = False


@dataclass(slots=True)
class _Incoming:
    grant: Grant
    pushed: list[set[int]]  # per layer: the blocks that arrived
    last_progress: float
    lanes: dict[int, _Lane] = field(default_factory=dict)
    lane_of: dict[int, int] = field(default_factory=dict)  # by layer
    count: int = 0  # lanes, once one has ended
    filled: frozenset[int] = field(default_factory=frozenset)
    done: bool = False
    damage: str = ""
    awaited: bool = False

    @property
    def moved(self) -> int:
        return sum(lane.moved for lane in self.lanes.values())

    @property
    def digest(self) -> bytes:
        return joined([self.lanes[index].digest.value for index in range(self.count)])


class FramesExport:
    """The owner's socket. See base.Export."""

    def __init__(
        self,
        slabs: Slabs,
        owner: Owner,
        *,
        tcp: bool = False,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listens on ipc in the owner's `run_dir`, or on tcp at its `bind_host` with its `keys`. A fill
        without progress for `patience_s` counts as lost."""
        self.dropped: Counter[str] = Counter()
        self._transport = "frames_tcp" if tcp else "frames"
        self._slabs = slabs
        self._rows = all_rows(slabs.layout, slabs.tensors)
        self._stamps = slabs.stamps
        self._expected = Expected(owner.epoch, slabs.blocks)
        self._incoming: dict[int, _Incoming] = {}
        self._patience_s, self._clock = patience_s, clock
        self._file: Path | None = None
        self._context = zmq.Context(io_threads(TCP_LANES if tcp else 1))
        self._tickets = Tickets()
        self._room = bytearray(largest_frame(slabs.layout)) if tcp else bytearray()
        self._connections: dict[bytes, _Connection] = {}  # by identity, the longest silent first
        self._owed: set[bytes] = set()  # connections that get an Ack
        self._damage_line = RareLine()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.rcvhwm = WAITING_FRAMES
        self._socket.sndhwm = 0  # Acks are few and small, and a dropped one would end a sealed way
        self._socket.linger = 0
        self._socket.maxmsgsize = largest_frame(slabs.layout)
        self._gate: Gate | None = None
        try:
            endpoints = self._bind_tcp(owner) if tcp else [self._bind_ipc(owner)]
        except (zmq.ZMQError, TransferError, OSError) as error:
            self.close()
            raise TransferError(f"cannot open a socket for KV frames: {error}") from error
        address: Plain = {
            "host": host_id(),
            "epoch": owner.epoch,
            "endpoints": [endpoint.encode() for endpoint in endpoints],
            "gate": self._gate.endpoint.encode() if self._gate else b"",
            "server_key": owner.keys.public if tcp and owner.keys else b"",
        }
        self.region = Region(self._transport, slabs.layout.fingerprint, slabs.blocks, address)

    def _bind_ipc(self, owner: Owner) -> str:
        folder = private_folder(owner.run_dir)
        remove_abandoned(folder, time.time())
        name = folder / f"kv-{secrets.token_hex(6)}.sock"
        self._socket.bind(f"ipc://{name}")
        self._file = name
        return f"ipc://{name}"

    def _bind_tcp(self, owner: Owner) -> list[str]:
        """A gate, and a port for each lane. What that accepts is read by one I/O thread."""
        host = owner.bind_host
        if host is None:
            raise TransferError("frames_tcp needs an address of this machine to bind")
        if owner.keys is None:
            raise TransferError("tcp needs CURVE keys")
        if host in ("*", "0.0.0.0", "::", "[::]"):
            raise TransferError(f"bind to one address of this machine, not to {host}")
        host = f"[{host}]" if ":" in host and "[" not in host else host
        self._gate = Gate(self._context, host, owner.keys, self._tickets)
        login_server(self._socket)
        self._socket.setsockopt(zmq.IPV6, int("[" in host))
        found = []
        for index in range(TCP_LANES):
            self._socket.affinity = affinity(self._context, index)
            self._socket.bind(f"tcp://{host}:*")
            found.append(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        return found

    def expect(self, grant: Grant) -> None:
        """See base.Export."""
        self._expected.add(grant)
        self._stamps.clear(grant)
        pushed: list[set[int]] = [set() for _ in self._rows]
        self._incoming[grant.generation] = _Incoming(grant, pushed, self._clock())

    def poll(self) -> bool:
        """See base.Export."""
        more = self._take()
        for identity in self._owed:
            self._answer(identity, Ack(self._connections[identity].read).encode())
        self._owed.clear()
        return more

    def _take(self) -> bool:
        taken = 0
        for _ in range(POLL_MESSAGES):
            try:
                taken += self._receive()
            except zmq.Again:
                return False
            if taken >= POLL_BYTES:
                return True
        return True

    def wakeups(self) -> Sequence[zmq.Socket[bytes]]:
        """The one socket."""
        return (self._socket,)

    def arrival(
        self, grant: Grant, receipt: Receipt, needed: Sequence[int] | None = None
    ) -> Arrival:
        """See base.Export."""
        if grant not in self._expected:
            return self._bad("unknown")
        incoming = self._incoming[grant.generation]
        if incoming.damage:  # counted when it happened
            return Arrival.LOST if incoming.damage in WAY else Arrival.BAD
        if (
            not incoming.awaited
        ):  # its prompt may have waited long: its bytes have until now + patience
            incoming.awaited, incoming.last_progress = True, self._clock()
        if not incoming.done:
            stalled = self._clock() - incoming.last_progress > self._patience_s
            return self._damaged(incoming, "lost") if stalled else Arrival.PENDING
        if (incoming.digest, incoming.moved) != (receipt.digest, receipt.moved_bytes):
            return self._bad("receipt")
        return self._bad("unfilled") if lacking(grant, incoming.filled, needed) else Arrival.READY

    def retire(self, grant: Grant) -> None:
        """See base.Export."""
        if grant in self._expected:
            self._expected.drop(grant)
            del self._incoming[grant.generation]

    def close(self) -> None:
        """Close the socket and remove its file."""
        if not self._context.closed:
            self._socket.close(0)
            self._context.term()
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _receive(self) -> int:
        """Receive one message and return its size in bytes; zmq.Again if there is none."""
        parts = [self._socket.recv(zmq.NOBLOCK, copy=False)]
        while parts[-1].more:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            parts = [*parts, part] if len(parts) < 4 else [*parts[:3], part]
        identity, *rest = (part.buffer for part in parts)
        connection = self._connection(bytes(identity), parts[-1])
        header = connection.open(rest[0], len(rest)) if rest else b""
        if header is None:
            self.dropped["forged"] += 1
            if not connection.broken:
                connection.broken = True
                self._answer(bytes(identity), BROKEN)
        else:
            connection.read += 1
            self._owed.add(bytes(identity))
            self._take_message(bytes(identity), connection, header, rest[1:])
        return sum(map(len, rest))

    def _take_message(
        self, identity: bytes, connection: _Connection, header: bytes, payload: Sequence[memoryview]
    ) -> None:
        match decode(header) if len(payload) < MOST_PARTS else None:
            case Piece() as piece if payload:
                self._take_piece(piece, connection, header, payload[0])
            case End() as end if not payload:
                self._take_end(end)
            case Probe(last=last) if payload:
                if last:
                    self._answer(identity, PROBED)
            case _:
                self.dropped["junk"] += 1

    def _connection(self, identity: bytes, part: zmq.Frame) -> _Connection:
        """Where this part of a message came from."""
        found = self._connections.pop(identity, None)
        if found is None:
            seals = self._tickets.seals(_login(part)) if self._gate else None
            found = _Connection(self._gate is not None, seals)
            if len(self._connections) >= MAX_CONNECTIONS:
                silent = (each for each in self._connections if each not in self._owed)
                del self._connections[next(silent)]
        self._connections[identity] = found
        return found

    def _answer(self, identity: bytes, message: bytes) -> None:
        try:
            sealed = self._connections[identity].close(message)
            self._socket.send_multipart([identity, sealed], zmq.NOBLOCK)
        except zmq.ZMQError:
            self.dropped["unanswered"] += 1

    def _take_piece(
        self, piece: Piece, connection: _Connection, header: bytes, payload: memoryview
    ) -> None:
        found = self._admit(piece)
        if found is None:
            return
        incoming, lane = found
        damage = self._unfit(piece, connection, len(payload), incoming)
        crc = None if damage else self._unpack(piece, connection, payload)
        if crc is None:
            self._damaged(incoming, damage or "seal")
            return
        lane.digest.add_crc(header, crc)
        incoming.pushed[piece.layer].update(piece.blocks)
        lane.moved += len(piece.blocks) * block_bytes(self._slabs.layout, piece.layer)

    def _unpack(self, piece: Piece, connection: _Connection, payload: memoryview) -> int | None:
        """Write the payload into its blocks. Returns its CRC; None if a seal does not open."""
        slab = self._slabs.tensors[piece.layer]
        rows = self._rows[piece.layer]
        if connection.seals is None:
            scatter(payload, rows, piece.blocks)
            return crc32(payload, 0)
        places = Places(self._slabs.layout, piece, slab, self._room)
        if not connection.seals.receives.open_into(piece.seal, payload, places.pieces):
            return None
        places.settle(rows)
        return places.crc

    def _admit(self, message: Piece | End) -> tuple[_Incoming, _Lane] | None:
        """The fill and lane that this message continues; None if it is dropped."""
        if message.epoch != self._expected.epoch:
            self.dropped["epoch"] += 1
            return None
        incoming = self._incoming.get(message.generation)
        if incoming is None:
            self.dropped["unknown"] += 1
            return None
        if message.lane not in incoming.lanes:
            incoming.lanes[message.lane] = _Lane(Digest(incoming.grant, self._transport))
        lane = incoming.lanes[message.lane]
        if incoming.done or incoming.damage or lane.ended:
            self.dropped["late"] += 1
        elif message.sequence < lane.expected:
            self.dropped["repeated"] += 1
        elif message.sequence > lane.expected:
            self._damaged(incoming, "gap")
        else:
            lane.expected += 1
            incoming.last_progress = self._clock()
            return incoming, lane
        return None

    def _unfit(self, piece: Piece, connection: _Connection, size: int, incoming: _Incoming) -> str:
        """Why this piece contradicts its grant or the layout; empty if it does not."""
        if piece.layer >= len(self._rows):
            return "layer"
        blocks = set(piece.blocks)
        if len(blocks) < len(piece.blocks) or not blocks <= set(incoming.grant.blocks):
            return "blocks"
        if incoming.lane_of.setdefault(piece.layer, piece.lane) != piece.lane:
            return "lane"  # of two pushes of a block the later one would not always win
        if connection.sealed != bool(piece.runs):
            return "seal"
        whole = len(piece.blocks) * block_bytes(self._slabs.layout, piece.layer)
        return "" if size == whole + 2 * SEAL_BYTES * len(piece.runs) else "size"

    def _take_end(self, end: End) -> None:
        found = self._admit(end)
        if found is None:
            return
        incoming, lane = found
        filled = frozenset(end.blocks)
        lane.digest.add(pack_blocks(end.blocks))
        lane.ended = True
        if incoming.count == 0:
            incoming.count, incoming.filled = end.lanes, filled
        if end.digest != lane.digest.value:
            self._damaged(incoming, "digest")
        elif end.total != lane.moved:
            self._damaged(incoming, "total")
        elif (incoming.count, incoming.filled) != (end.lanes, filled):
            self._damaged(incoming, "unfilled")
        elif sum(each.ended for each in incoming.lanes.values()) == end.lanes:
            self._complete(incoming, end)

    def _complete(self, incoming: _Incoming, end: End) -> None:
        """All lanes have ended: stamp what is filled."""
        if len(incoming.lanes) > end.lanes:
            self._damaged(incoming, "lane")
        elif not all(incoming.filled <= blocks for blocks in incoming.pushed):
            self._damaged(incoming, "unfilled")
        else:
            self._stamps.write(end.blocks, end.generation)
            incoming.done = True

    def _damaged(self, incoming: _Incoming, reason: str) -> Arrival:
        incoming.damage = reason
        if (more := self._damage_line.more(self._clock())) is not None:
            logger.warning("%s: KV arrived damaged (%s)%s", incoming.grant.run, reason, more)
        bad = self._bad(reason)
        return Arrival.LOST if reason in WAY else bad

    def _bad(self, reason: str) -> Arrival:
        self.dropped[reason] += 1
        return Arrival.BAD


def _login(part: zmq.Frame) -> bytes:
    try:
        return str(part.get("User-Id")).encode()
    except zmq.ZMQError:  # it did not log in
        return b""


export, link = FramesExport, FramesLink  # see baton/kv/transports.py
export_tcp = partial(FramesExport, tcp=True)
