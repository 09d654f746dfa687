"""The writer's side of frames: blocks are gathered into messages of at most 1 MiB and sent in order, each
layer by one lane (lanes.py). Over tcp there are several lanes, and what they send is sealed (sealing.py).

A push waits for room in the lane's window, and raises TransferError if the way is lost. Frames hold
copies, so the caller may reuse its blocks as soon as push() returns. courier.py keeps the waiting out of
a worker's loop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import zmq

from baton import failpoint
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Receipt, Region
from baton.transfer.base import Writer
from baton.transfer.checks import Address, check_grant, check_push, in_order
from baton.transfer.frame_codec import (
    FRAME_BYTES,
    MAX_LANES,
    End,
    Piece,
    Probe,
    blocks_per_frame,
)
from baton.transfer.gate import ask_for_tickets
from baton.transfer.lanes import CONNECT_S, Lanes, Parts
from baton.transfer.packing import Packed, Payload, pack
from baton.transfer.sealing import Ticket
from baton.transfer.stamps import Digest, joined, pack_blocks

PROBE_S = 1.0
FIRST_PROBE_BYTES = 16 << 10


@dataclass(slots=True)
class _Lane:
    digest: Digest
    sequence: int = 0
    moved: int = 0


@dataclass(slots=True)
class _Outgoing:
    lanes: list[_Lane]
    seconds: float = 0.0
    broken: bool = False


class FramesLink:
    """Connections to one owner. `send` sends the parts of one message by a lane; tests inject faults
    there."""

    slabs: Sequence[torch.Tensor] | None = None
    tend_s = 0.2

    def __init__(self, region: Region, layout: KVLayout, writer: Writer) -> None:
        """Waits at most CONNECT_S for the owner. TransferError if it does not accept this process."""
        self.transport = region.transport
        self.why = ""
        self._layout = layout
        self._outgoing: dict[int, _Outgoing] = {}
        self._unsure: dict[str, tuple[int, ...]] = {}  # ended runs whose arrival is not known yet
        address = Address(region)
        address.check_layout(layout)
        self._epoch = address.field("epoch", str)
        endpoints = [
            each.decode("utf-8", "replace") for each in address.list_of("endpoints", bytes)
        ]
        if not 0 < len(endpoints) <= MAX_LANES:
            raise TransferError(f"a pool with {len(endpoints)} sockets, it may have {MAX_LANES}")
        self._lanes = Lanes(len(endpoints), deadline_s=writer.deadline_s)
        self.send: Callable[[Parts, int], None] = self._send
        try:
            self._connect(address, endpoints, writer)
        except (zmq.ZMQError, TransferError) as error:
            self.close()
            raise TransferError(f"frames to {endpoints[0]}: {error}") from error

    def _connect(self, address: Address, endpoints: Sequence[str], writer: Writer) -> None:
        keys, server = writer.keys, address.field("server_key", bytes)
        gate = address.field("gate", bytes).decode("utf-8", "replace")
        deadline = time.monotonic() + min(CONNECT_S, writer.deadline_s)
        tickets: list[Ticket] = []
        if self.transport == "frames" and all(e.startswith("ipc://") for e in endpoints):
            address.check_host()
        elif not all(endpoint.startswith("tcp://") for endpoint in (gate, *endpoints)):
            raise TransferError("the endpoint is not a tcp address")
        elif keys is None or server not in keys.trusted:
            raise TransferError("tcp needs CURVE keys, and the pool owner's key must be trusted")
        else:
            left = deadline - time.monotonic()
            tickets = ask_for_tickets(gate, len(endpoints), keys, server, left)
        self._lanes.connect(endpoints, tickets, deadline - time.monotonic())

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
        outgoing, many = self._of(grant), blocks_per_frame(self._layout, layer)
        for first in range(0, len(source), many):
            chosen = target[first : first + many]
            packed = self.pack(layer, slab, source[first : first + many], chosen)
            self._send_next(outgoing, grant, layer, packed, chosen)
        outgoing.seconds += time.perf_counter() - started

    def pack(
        self, layer: int, slab: torch.Tensor, source: Sequence[int], target: Sequence[int]
    ) -> Packed:
        """The payload of at most blocks_per_frame() blocks, for push_packed()."""
        seals = self._lanes.seals(layer % len(self._lanes))
        sends = None if seals is None else seals.sends
        return pack(self._layout, layer, slab, source, target, sends)

    def drop(self, packed: Payload) -> None:
        """What pack() returned is not pushed. Nothing has to be given back."""

    def push_packed(self, grant: Grant, layer: int, packed: Payload, target: Sequence[int]) -> None:
        """As push(), of what pack() returned."""
        assert isinstance(packed, Packed)
        started = time.perf_counter()
        outgoing = self._of(grant)
        self._send_next(outgoing, grant, layer, packed, target)
        outgoing.seconds += time.perf_counter() - started

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """See base.Link."""
        started = time.perf_counter()
        ordered = tuple(in_order(grant, blocks))
        outgoing, count = self._of(grant), len(self._lanes)
        for index, lane in enumerate(outgoing.lanes):
            lane.digest.add(pack_blocks(ordered))
            way = (grant.epoch, grant.generation, index, count, lane.sequence)
            self.send([End(*way, lane.moved, lane.digest.value, ordered).encode()], index)
        del self._outgoing[grant.generation]
        self._forget_arrived()
        self._unsure[grant.run] = self._lanes.marks()
        seconds = outgoing.seconds + time.perf_counter() - started
        moved = sum(lane.moved for lane in outgoing.lanes)
        digest = joined([lane.digest.value for lane in outgoing.lanes])
        return Receipt(moved, digest, seconds, self.transport)

    def abandon(self, grant: Grant) -> None:
        """The owner drops the frames that are still on their way."""
        self._outgoing.pop(grant.generation, None)
        self._unsure.pop(grant.run, None)

    def probe(self) -> float:
        """GB/s as far as it can be told within PROBE_S, which small messages tell of a slow way; 0 if the
        owner does not answer in time. It is for people: the way works whatever it says."""
        deadline = time.monotonic() + PROBE_S
        rest = self._round_trip(1, 1, deadline)
        if rest is None:
            return 0.0
        size, frames, rate = FIRST_PROBE_BYTES, 1, 0.0
        while frames == 1:
            frames = len(self._lanes) * 4 if size > FRAME_BYTES else 1
            size = min(size, FRAME_BYTES)
            took = self._round_trip(size, frames, deadline)
            if took is None:
                break
            rate = size * frames / max(took - rest, took / 4) / 1e9
            if took - rest > PROBE_S / 20:  # the next one would take several times as long
                break
            size *= 4
        return rate

    def _round_trip(self, size: int, frames: int, deadline: float) -> float | None:
        """Seconds until the owner has answered so many frames of this size; None: not by then."""
        started, payload = time.monotonic(), memoryview(bytes(size))
        wanted = self._lanes.probed + min(frames, len(self._lanes))
        for number in range(frames):
            last = number >= frames - len(self._lanes)
            self._send([Probe(last=last).encode(), payload], number % len(self._lanes))
        while self._lanes.probed < wanted:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._lanes.tend(left)
        return time.monotonic() - started

    def tend(self) -> None:
        """Look whether the way still works, without waiting. TransferError if it is lost."""
        self._lanes.tend()
        self._forget_arrived()

    def written(self, grant: Grant) -> bool:
        """True: the owner counts and hashes what arrives."""
        return True

    def _forget_arrived(self) -> None:
        self._unsure = {r: m for r, m in self._unsure.items() if not self._lanes.arrived(m)}

    @property
    def unsure(self) -> tuple[str, ...]:
        """Runs that were finished and, for all that is known, have not arrived."""
        return tuple(r for r, m in list(self._unsure.items()) if not self._lanes.arrived(m))

    @property
    def owed(self) -> bool:
        """An acknowledgement is missing."""
        return self._lanes.on_its_way > 0

    @property
    def quiet_since(self) -> float | None:
        """Since when (time.monotonic) the owner has acknowledged nothing; None if it owes nothing."""
        return self._lanes.quiet_since

    def stop(self, why: str) -> None:
        """From any thread: what waits here raises TransferError soon."""
        self._lanes.stopped = why

    def close(self) -> None:
        """Queued frames get half a second to leave."""
        self._lanes.close()

    def _of(self, grant: Grant) -> _Outgoing:
        check_grant(grant, self._epoch, closed=self._lanes.closed)
        if grant.generation not in self._outgoing:
            lanes = [_Lane(Digest(grant, self.transport)) for _ in range(len(self._lanes))]
            self._outgoing[grant.generation] = _Outgoing(lanes)
        outgoing = self._outgoing[grant.generation]
        if outgoing.broken:
            raise TransferError(f"{grant.run}: an earlier part of this fill was not sent")
        return outgoing

    def _send_next(
        self,
        outgoing: _Outgoing,
        grant: Grant,
        layer: int,
        packed: Packed,
        target: Sequence[int],
    ) -> None:
        outgoing.broken = True  # until it is sent
        index = layer % len(self._lanes)
        lane = outgoing.lanes[index]
        way = (grant.epoch, grant.generation, index, lane.sequence)
        header = Piece(*way, layer, tuple(target), packed.seal, packed.runs).encode()
        lane.digest.add_crc(header, packed.crc)
        failpoint.hit("prefill.payload", packed.payload.numpy)
        self.send([header, packed.payload.numpy().data], index)
        outgoing.broken = False
        lane.sequence += 1
        lane.moved += packed.size

    def _send(self, parts: Parts, lane: int = 0) -> None:
        self._lanes.send(parts, lane)
