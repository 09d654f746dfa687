"""Frames: KV bytes as ZeroMQ messages. Works everywhere; over tcp it uses CURVE, which authenticates
and encrypts.

The owner writes each piece into the pool as it arrives. The blocks are granted but not stamped, so
no other run reads them. When the End agrees with what was counted and hashed, the blocks are
stamped. Pieces must arrive in order. Anything else is dropped and counted by reason:

    junk       not a valid message                   epoch      from another epoch of this pool
    unknown    no such grant (retired, never made)   repeated   a sequence number seen before
    gap        an earlier piece is missing           late       after the End
    layer, blocks, size   outside the grant or the layout
    digest, total, unfilled   the End contradicts what arrived

Every reason but junk, epoch, unknown, repeated and late also makes the grant BAD.
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
from baton.transfer.curve import secure_server
from baton.transfer.frame_codec import PROBED, End, Piece, Probe, decode, largest_frame
from baton.transfer.frames_link import WAITING_FRAMES, FramesLink
from baton.transfer.pieces import all_rows, block_bytes, scatter
from baton.transfer.slabs import Slabs, private_folder
from baton.transfer.stamps import Digest, Expected, Stamps, lacking, pack_blocks
from baton.wire.rare_line import RareLine

POLL_BYTES = 8 << 20
POLL_MESSAGES = 256
PATIENCE_S = 10.0
ABANDONED_S = 1.0

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
class _Incoming:
    grant: Grant
    digest: Digest
    pushed: list[set[int]]  # per layer: the blocks that arrived
    last_progress: float
    expected: int = 0  # the next sequence number
    moved: int = 0
    filled: frozenset[int] = field(default_factory=frozenset)
    done: bool = False
    damage: str = ""


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
        self._stamps = Stamps(slabs.tensors[-1])
        self._expected = Expected(owner.epoch, slabs.blocks)
        self._incoming: dict[int, _Incoming] = {}
        self._patience_s, self._clock = patience_s, clock
        self._file: Path | None = None
        self._context = zmq.Context()
        self._damage_line = RareLine()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = WAITING_FRAMES
        self._socket.linger = 0
        self._socket.maxmsgsize = largest_frame(slabs.layout)
        try:
            endpoint = self._bind_tcp(owner) if tcp else self._bind_ipc(owner)
        except (zmq.ZMQError, TransferError, OSError) as error:
            self.close()
            raise TransferError(f"cannot open a socket for KV frames: {error}") from error
        address: Plain = {
            "host": host_id(),
            "epoch": owner.epoch,
            "endpoint": endpoint,
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

    def _bind_tcp(self, owner: Owner) -> str:
        host = owner.bind_host
        if host is None:
            raise TransferError("frames_tcp needs an address of this machine to bind")
        if owner.keys is None:
            raise TransferError("tcp needs CURVE keys")
        if host in ("*", "0.0.0.0", "::", "[::]"):
            raise TransferError(f"bind to one address of this machine, not to {host}")
        secure_server(self._socket, owner.keys)
        host = f"[{host}]" if ":" in host and "[" not in host else host
        self._socket.setsockopt(zmq.IPV6, int("[" in host))
        self._socket.bind(f"tcp://{host}:*")
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def expect(self, grant: Grant) -> None:
        """See base.Export."""
        self._expected.add(grant)
        self._stamps.write(grant.blocks, 0)
        pushed: list[set[int]] = [set() for _ in self._rows]
        digest = Digest(grant, self._transport)
        self._incoming[grant.generation] = _Incoming(grant, digest, pushed, self._clock())

    def poll(self) -> bool:
        """See base.Export."""
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
        if incoming.damage:
            return Arrival.BAD  # counted when it happened
        if not incoming.done:
            stalled = self._clock() - incoming.last_progress > self._patience_s
            return self._damaged(incoming, "lost") if stalled else Arrival.PENDING
        if (incoming.digest.value, incoming.moved) != (receipt.digest, receipt.moved_bytes):
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
        identity, header, *payload = (
            (part.buffer for part in parts) if len(parts) > 1 else (b"", b"")
        )
        match decode(bytes(header)) if len(parts) in (2, 3) else None:
            case Piece() as piece if payload:
                self._take_piece(piece, bytes(header), payload[0])
            case End() as end if not payload:
                self._take_end(end)
            case Probe(last=last) if payload:
                if last:
                    self._answer(bytes(identity))
            case _:
                self.dropped["junk"] += 1
        return sum(len(part.buffer) for part in parts)

    def _answer(self, identity: bytes) -> None:
        try:
            self._socket.send_multipart([identity, PROBED], zmq.NOBLOCK)
        except zmq.ZMQError:
            self.dropped["unanswered"] += 1

    def _take_piece(self, piece: Piece, header: bytes, payload: memoryview) -> None:
        incoming = self._admit(piece)
        if incoming is None:
            return
        damage = self._unfit(piece, len(payload), incoming.grant)
        if damage:
            self._damaged(incoming, damage)
            return
        incoming.digest.add(header, payload)
        scatter(payload, self._rows[piece.layer], piece.blocks)
        incoming.pushed[piece.layer].update(piece.blocks)
        incoming.moved += len(payload)

    def _admit(self, message: Piece | End) -> _Incoming | None:
        """The fill that this message continues; None if it is dropped."""
        if message.epoch != self._expected.epoch:
            self.dropped["epoch"] += 1
            return None
        incoming = self._incoming.get(message.generation)
        if incoming is None:
            self.dropped["unknown"] += 1
        elif incoming.done or incoming.damage:
            self.dropped["late"] += 1
        elif message.sequence < incoming.expected:
            self.dropped["repeated"] += 1
        elif message.sequence > incoming.expected:
            self._damaged(incoming, "gap")
        else:
            incoming.expected += 1
            incoming.last_progress = self._clock()
            return incoming
        return None

    def _unfit(self, piece: Piece, size: int, grant: Grant) -> str:
        """Why this piece contradicts its grant or the layout; empty if it does not."""
        if piece.layer >= len(self._rows):
            return "layer"
        blocks = set(piece.blocks)
        if len(blocks) < len(piece.blocks) or not blocks <= set(grant.blocks):
            return "blocks"
        whole = len(piece.blocks) * block_bytes(self._slabs.layout, piece.layer)
        return "" if size == whole else "size"

    def _take_end(self, end: End) -> None:
        incoming = self._admit(end)
        if incoming is None:
            return
        filled = frozenset(end.blocks)
        incoming.digest.add(pack_blocks(end.blocks))
        if end.digest != incoming.digest.value:
            self._damaged(incoming, "digest")
        elif end.total != incoming.moved:
            self._damaged(incoming, "total")
        elif not all(filled <= blocks for blocks in incoming.pushed):
            self._damaged(incoming, "unfilled")
        else:
            self._stamps.write(end.blocks, end.generation)
            incoming.filled, incoming.done = filled, True

    def _damaged(self, incoming: _Incoming, reason: str) -> Arrival:
        incoming.damage = reason
        if (more := self._damage_line.more(self._clock())) is not None:
            logger.warning("%s: KV arrived damaged (%s)%s", incoming.grant.run, reason, more)
        return self._bad(reason)

    def _bad(self, reason: str) -> Arrival:
        self.dropped[reason] += 1
        return Arrival.BAD


export, link = FramesExport, FramesLink  # see baton/kv/transports.py
export_tcp = partial(FramesExport, tcp=True)
