"""The writer's side of frames: blocks are gathered into messages of at most 1 MiB and sent in order.

Up to 32 frames queue here and 32 at the owner. Beyond that a push waits for space in the queue, and
raises TransferError after `deadline_s` without any. Frames hold copies, so the caller may reuse its
blocks as soon as push() returns.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import zmq
from zmq.utils.monitor import parse_monitor_message

from baton import failpoint
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Receipt, Region
from baton.transfer.base import Writer
from baton.transfer.checks import Address, check_grant, check_push, in_order
from baton.transfer.curve import secure_client
from baton.transfer.frame_codec import FRAME_BYTES, End, Piece, Probe, blocks_per_frame
from baton.transfer.pieces import gather, rows
from baton.transfer.stamps import Digest, pack_blocks

WAITING_FRAMES = 32
LINGER_MS = 500
CONNECT_S = 2.0
PROBE_FRAMES = 16

Parts = list[bytes | memoryview]


@dataclass(slots=True)
class _Outgoing:
    digest: Digest
    sequence: int = 0
    moved: int = 0
    seconds: float = 0.0
    broken: bool = False


class FramesLink:
    """A connection to one owner. `send` sends the parts of one message; tests inject faults there."""

    slabs: Sequence[torch.Tensor] | None = None

    def __init__(self, region: Region, layout: KVLayout, writer: Writer) -> None:
        """Waits at most CONNECT_S for the owner. TransferError if it does not accept this process."""
        self.transport = region.transport
        self.why = ""
        self._layout = layout
        self._deadline_s = writer.deadline_s
        self._outgoing: dict[int, _Outgoing] = {}
        address = Address(region)
        address.check_layout(layout)
        self._epoch = address.field("epoch", str)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self.send: Callable[[Parts], None] = self._send
        try:
            self._connect(address, writer)
        except (zmq.ZMQError, TransferError) as error:
            self.close()
            raise TransferError(f"frames to {address.field('endpoint', str)}: {error}") from error

    def _connect(self, address: Address, writer: Writer) -> None:
        keys = writer.keys
        endpoint, server = address.field("endpoint", str), address.field("server_key", bytes)
        self._socket.sndhwm = self._socket.rcvhwm = WAITING_FRAMES
        self._socket.linger = LINGER_MS
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing before the connection is up
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        if self.transport == "frames" and endpoint.startswith("ipc://"):
            address.check_host()
        elif not endpoint.startswith("tcp://"):
            raise TransferError("the endpoint is not a tcp address")
        elif keys is None or server not in keys.trusted:
            raise TransferError("tcp needs CURVE keys, and the pool owner's key must be trusted")
        else:
            secure_client(self._socket, keys, server)
        wait_for_handshake(self._socket, endpoint, min(CONNECT_S, writer.deadline_s))

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """See base.Link. Returns when the last frame is in the queue."""
        started = time.perf_counter()
        check_push(grant, self._layout, layer, source, target)
        outgoing = self._of(grant)
        view, many = rows(self._layout, layer, slab), blocks_per_frame(self._layout, layer)
        for first in range(0, len(source), many):
            payload = gather(view, source[first : first + many])
            blocks = tuple(target[first : first + many])
            piece = Piece(grant.epoch, grant.generation, outgoing.sequence, layer, blocks)
            self._send_next(outgoing, piece.encode(), payload)
        outgoing.seconds += time.perf_counter() - started

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """See base.Link."""
        started = time.perf_counter()
        ordered = tuple(in_order(grant, blocks))
        outgoing = self._of(grant)
        outgoing.digest.add(pack_blocks(ordered))
        digest, moved = outgoing.digest.value, outgoing.moved
        end = End(grant.epoch, grant.generation, outgoing.sequence, moved, digest, ordered)
        self.send([end.encode()])
        del self._outgoing[grant.generation]
        seconds = outgoing.seconds + time.perf_counter() - started
        return Receipt(moved, digest, seconds, self.transport)

    def abandon(self, grant: Grant) -> None:
        """The owner drops the frames that are still on their way."""
        self._outgoing.pop(grant.generation, None)

    def probe(self) -> float:
        """GB/s of 16 MiB, acknowledged by the owner's next poll()."""
        payload = memoryview(bytes(FRAME_BYTES))
        started = time.perf_counter()
        for i in range(PROBE_FRAMES):
            self._send([Probe(last=i == PROBE_FRAMES - 1).encode(), payload])
        if not self._socket.poll(int(self._deadline_s * 1000)):
            raise TransferError(f"no answer to a probe within {self._deadline_s:g} s")
        self._socket.recv_multipart()
        return PROBE_FRAMES * FRAME_BYTES / (time.perf_counter() - started) / 1e9

    def close(self) -> None:
        """Queued frames get half a second to leave."""
        if not self._context.closed:
            self._socket.close()
            self._context.term()

    def _of(self, grant: Grant) -> _Outgoing:
        check_grant(grant, self._epoch, closed=self._context.closed)
        outgoing = self._outgoing.setdefault(
            grant.generation, _Outgoing(Digest(grant, self.transport))
        )
        if outgoing.broken:
            raise TransferError(f"{grant.run}: an earlier part of this fill was not sent")
        return outgoing

    def _send_next(self, outgoing: _Outgoing, header: bytes, payload: torch.Tensor) -> None:
        outgoing.broken = True  # until it is sent
        outgoing.digest.add(header, payload)
        failpoint.hit("prefill.payload", payload.numpy)
        self.send([header, payload.numpy().data])
        outgoing.broken = False
        outgoing.sequence += 1
        outgoing.moved += payload.numel()

    def _send(self, parts: Parts) -> None:
        deadline = time.monotonic() + self._deadline_s
        while True:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
                return
            except zmq.Again:
                left = deadline - time.monotonic()
                if left <= 0 or not self._socket.poll(int(left * 1000) + 1, zmq.POLLOUT):
                    raise TransferError(
                        f"the owner of the KV pool received nothing for {self._deadline_s:g} s"
                    ) from None


def wait_for_handshake(socket: zmq.Socket[bytes], endpoint: str, connect_s: float) -> None:
    """Connect, and return once the other side's I/O thread has accepted the handshake."""
    failed = zmq.EVENT_HANDSHAKE_FAILED_AUTH
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | failed)
    deadline = time.monotonic() + connect_s
    try:
        socket.connect(endpoint)
        while monitor.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            event = parse_monitor_message(monitor.recv_multipart())
            if event["event"] == failed:
                raise TransferError("the owner refused this process's key")
            return
        raise TransferError(f"no answer within {connect_s:g} s")
    finally:
        socket.disable_monitor()
        monitor.close(0)
