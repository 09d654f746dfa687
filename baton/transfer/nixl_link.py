"""The writer's side of NIXL: blocks are copied into a registered buffer, and written from there into the
owner's pool. See nixl.py.

A push returns when its writes have begun. finish() and abandon() return when all of the fill's writes
are done, in the owner's memory; so a receipt needs no confirmation, and after abandon() nothing is
written. NIXL itself waits for ever: a link on which no write ends for `deadline_s` raises TransferError.
courier.py keeps the waiting out of a worker's loop.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch
import zmq

from baton import failpoint
from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout
from baton.kv.region import Receipt, Region
from baton.transfer.base import Writer
from baton.transfer.block_crcs import block_crc, pack_crcs
from baton.transfer.checks import Address, check_grant, check_push, check_source, in_order
from baton.transfer.frame_codec import blocks_per_frame, largest_frame
from baton.transfer.knock import Knock
from baton.transfer.lanes import CONNECT_S, WINDOW_BYTES, next_window
from baton.transfer.nixl_agent import Agent, Memory, way_to
from baton.transfer.nixl_doors import SCRATCH_BYTES, Close, Open, Opened, Refused, decode
from baton.transfer.packing import Gathered, Payload
from baton.transfer.pieces import Rows, block_bytes, gather, rows, stretches
from baton.transfer.stamps import Digest, pack_blocks

PROBE_S = 1.0
FIRST_PROBE_BYTES = 16 << 10
AHEAD_BYTES = 64 << 20
"""Registered memory for blocks that are packed before their turn has come."""
PAUSE_S = 100e-6
"""Between two looks at writes that are waited for. NIXL has nothing that a thread could sleep on."""


class Ring:
    """Room in a buffer, taken from one place after the other. For any thread."""

    def __init__(self, first: int, size: int) -> None:
        """The bytes from `first` on."""
        self._first, self._size = first, size
        self._lock = threading.Lock()
        self._taken: deque[tuple[int, int]] = deque()  # first byte, end
        self._over: set[int] = set()  # first bytes of those given back behind one that is not

    def take(self, size: int) -> int | None:
        """Where so many bytes are free, now taken; None if they are not."""
        with self._lock:
            place = self._place(size)
            if place is not None:
                self._taken.append((place, place + size))
            return None if place is None else self._first + place

    def _place(self, size: int) -> int | None:
        if not self._taken:
            return 0 if size <= self._size else None
        (first, _), (last, end) = self._taken[0], self._taken[-1]
        if last < first:  # it has begun anew at the front
            return end if end + size <= first else None
        if end + size <= self._size:
            return end
        return 0 if size <= first else None

    def give_back(self, place: int) -> None:
        """What was taken there is free, once all that was taken before it is."""
        with self._lock:
            self._over.add(place - self._first)
            while self._taken and self._taken[0][0] in self._over:
                self._over.discard(self._taken.popleft()[0])


@dataclass(frozen=True, slots=True)
class Placed:
    """Blocks that lie in the registered buffer and can be written from there."""

    place: int
    size: int
    crcs: tuple[int, ...]  # of the blocks


@dataclass(slots=True)
class _Outgoing:
    crcs: list[dict[int, int]]  # per layer, by block
    last: dict[tuple[int, int], int] = field(default_factory=dict)  # layer, block: its last write
    writes: int = 0  # its last one
    moved: int = 0
    seconds: float = 0.0
    broken: bool = False


@dataclass(frozen=True, slots=True)
class _Flight:
    """A write that is not done."""

    request: int
    ring: Ring
    place: int
    size: int
    began: float


class NixlLink:
    """A door to one owner's pool. `write` begins one write; tests inject faults there."""

    transport = "nixl"
    slabs: Sequence[torch.Tensor] | None = None
    tend_s = 0.001  # its writes move on only then

    def __init__(self, region: Region, layout: KVLayout, writer: Writer) -> None:
        """Waits at most CONNECT_S for the owner. TransferError if it does not let this process in."""
        self.why = ""
        self.stopped = ""  # why another thread wants the waiting to end
        self._layout, self._blocks, self._deadline_s = layout, region.blocks, writer.deadline_s
        self._outgoing: dict[int, _Outgoing] = {}
        self._flights: deque[_Flight] = deque()
        self._begun = self._done = 0  # writes
        self._bytes, self._window = 0, WINDOW_BYTES
        self._progress = 0.0  # when a write ended, or the first one after a rest began
        self._knock: Knock | None = None
        self._agent: Agent | None = None
        address = Address(region)
        address.check_layout(layout)
        self._epoch = address.field("epoch", str)
        endpoint = address.field("endpoint", bytes).decode("utf-8", "replace")
        try:
            self._connect(address, endpoint, writer)
        except (zmq.ZMQError, TransferError) as error:
            self.close()
            raise TransferError(f"{endpoint}: {error}") from error
        self.write: Callable[[Sequence[Memory], Sequence[Memory]], int] = self._write

    def _connect(self, address: Address, endpoint: str, writer: Writer) -> None:
        keys, server = writer.keys, address.field("server_key", bytes)
        if not endpoint.startswith("tcp://"):
            raise TransferError("the endpoint is not a tcp address")
        if keys is None or server not in keys.trusted:
            raise TransferError("nixl needs CURVE keys, and the pool owner's key must be trusted")
        if writer.device.type != "cpu":
            raise TransferError(f"nixl moves KV between CPUs, the writer is on {writer.device}")
        size = max(WINDOW_BYTES, 2 * largest_frame(self._layout))
        self._ring, self._ahead = Ring(0, size), Ring(size, AHEAD_BYTES)
        self._buffer = torch.empty(size + AHEAD_BYTES, dtype=torch.uint8)
        self._view = self._buffer.numpy().data
        name, way = (
            f"{writer.name}.{secrets.token_hex(4)}",
            way_to(urlsplit(endpoint).hostname or ""),
        )
        self._agent = Agent(name, [self._buffer], way, thread=False)
        self._knock = Knock(endpoint, keys, server)
        order, within_s = Open(self._epoch, writer.name), min(CONNECT_S, writer.deadline_s)
        match decode(self._knock.ask(order.encode(), within_s)):
            case Opened() as opened:
                self._opened = opened
            case Refused(why):
                raise TransferError(f"the owner refuses: {why}")
            case _:
                raise TransferError("the owner's answer is malformed: it runs another version")
        if len(self._opened.slabs) != len(self._layout.layers):
            raise TransferError("the owner's pool has another number of layers")
        self._peer = self._agent.connect(self._opened.metadata)

    def push(
        self,
        grant: Grant,
        layer: int,
        slab: torch.Tensor,
        source: Sequence[int],
        target: Sequence[int],
    ) -> None:
        """See base.Link. Waits for room in the buffer."""
        check_push(grant, self._layout, layer, source, target)
        started, outgoing = time.perf_counter(), self._of(grant)
        view, many = rows(self._layout, layer, slab), blocks_per_frame(self._layout, layer)
        check_source(source, len(view.keys))
        for first in range(0, len(source), many):
            some, chosen = source[first : first + many], target[first : first + many]
            size = len(some) * block_bytes(self._layout, layer)
            outgoing.broken = True  # until it is on its way
            packed = self._put(layer, view, some, self._take(size), size)
            self._send(outgoing, layer, packed, chosen, self._ring)
        outgoing.seconds += time.perf_counter() - started

    def pack(
        self, layer: int, slab: torch.Tensor, source: Sequence[int], target: Sequence[int]
    ) -> Payload:
        """A copy of at most blocks_per_frame() blocks: in the registered buffer, if it has room."""
        view, size = rows(self._layout, layer, slab), len(source) * block_bytes(self._layout, layer)
        if not self._view or (place := self._ahead.take(size)) is None:
            return Gathered(gather(view, source))
        return self._put(layer, view, source, place, size)

    def _put(self, layer: int, view: Rows, source: Sequence[int], place: int, size: int) -> Placed:
        gather(view, source, self._buffer[place : place + size])
        data, count = self._view[place : place + size], len(source)
        crcs = (block_crc(data, self._layout, layer, count, index) for index in range(count))
        return Placed(place, size, tuple(crcs))

    def push_packed(self, grant: Grant, layer: int, packed: Payload, target: Sequence[int]) -> None:
        """As push(), of what pack() returned."""
        assert isinstance(packed, Placed)
        started, outgoing = time.perf_counter(), self._of(grant)
        outgoing.broken = True  # until it is on its way
        self._wait(lambda: not self._flights or self._bytes + packed.size <= self._window)
        self._send(outgoing, layer, packed, target, self._ahead)
        outgoing.seconds += time.perf_counter() - started

    def drop(self, packed: Payload) -> None:
        """What pack() returned is not pushed."""
        assert isinstance(packed, Placed)
        self._ahead.give_back(packed.place)

    def _send(
        self, outgoing: _Outgoing, layer: int, packed: Placed, target: Sequence[int], ring: Ring
    ) -> None:
        """Begin one write, of what lies in this part of the buffer."""
        before = max((outgoing.last.get((layer, block), 0) for block in target), default=0)
        self._wait(lambda: self._done >= before)  # of two writes of a block the later one wins
        outgoing.crcs[layer].update(zip(target, packed.crcs, strict=True))
        place, size = packed.place, packed.size
        failpoint.hit("prefill.payload", self._buffer[place : place + size].numpy)
        self._begin(*self._places(layer, place, target), ring, place, size)
        outgoing.last.update(((layer, block), self._begun) for block in target)
        outgoing.writes, outgoing.broken = self._begun, False
        outgoing.moved += size

    def finish(self, grant: Grant, blocks: Sequence[int]) -> Receipt:
        """See base.Link. Returns when everything is in the owner's memory."""
        started = time.perf_counter()
        ordered = in_order(grant, blocks)
        outgoing = self._of(grant)
        if missing := [b for b in ordered if not all(b in crcs for crcs in outgoing.crcs)]:
            raise TransferError(
                f"{grant.run}: blocks {missing[:4]} were not pushed for every layer"
            )
        self._wait(lambda: self._done >= outgoing.writes)
        digest = Digest(grant, self.transport)
        digest.add(pack_blocks(ordered))
        for layer, crcs in enumerate(outgoing.crcs):
            digest.add(pack_crcs(layer, [crcs[block] for block in ordered]))
        del self._outgoing[grant.generation]
        seconds = outgoing.seconds + time.perf_counter() - started
        return Receipt(outgoing.moved, digest.value, seconds, self.transport)

    def abandon(self, grant: Grant) -> None:
        """See base.Link. Returns when none of its writes is under way. TransferError if that cannot be
        known: then the owner has to shut this writer out."""
        if (outgoing := self._outgoing.pop(grant.generation, None)) is not None:
            self._wait(lambda: self._done >= outgoing.writes)

    def probe(self) -> float:
        """GB/s as far as it can be told within PROBE_S, in memory that no block is in; 0 if it takes
        longer. It is for people: the way works whatever it says."""
        deadline = time.monotonic() + PROBE_S
        size, writes, rate = FIRST_PROBE_BYTES, 1, 0.0
        rest = self._probe(1, 1, deadline)  # makes the connection
        rest = None if rest is None else self._probe(1, 1, deadline)
        while rest is not None and writes == 1:
            writes = 8 if size > SCRATCH_BYTES else 1
            size = min(size, SCRATCH_BYTES)
            if (took := self._probe(size, writes, deadline)) is None:
                break
            rate = size * writes / max(took - rest, took / 4) / 1e9
            if took > PROBE_S / 20:  # the next one would take several times as long
                break
            size *= 4
        return rate

    def _probe(self, size: int, writes: int, deadline: float) -> float | None:
        """Seconds that so many writes of this size take; None: they are not done by then."""
        began = time.monotonic()
        for _ in range(writes):
            place = self._take(size)
            ours = [(self._buffer.data_ptr() + place, size)]
            self._begin(ours, [(self._opened.scratch, size)], self._ring, place, size)
        wanted = self._begun
        self._wait(lambda: self._done >= wanted or time.monotonic() > deadline)
        return time.monotonic() - began if self._done >= wanted else None

    def tend(self) -> None:
        """Look whether the way still works, without waiting. TransferError if it is lost."""
        if self._agent is None or self._knock is None:
            raise TransferError("this link is closed")
        if self.stopped:
            raise TransferError(self.stopped)
        while self._flights and self._agent.done(self._flights[0].request):
            flight, now = self._flights.popleft(), time.monotonic()
            flight.ring.give_back(flight.place)
            self._done, self._progress = self._done + 1, now
            self._bytes -= flight.size
            age_s = now - flight.began
            self._window = next_window(self._window, flight.size, age_s, WINDOW_BYTES)
        self._knock.tend()
        if self._flights and time.monotonic() - self._progress >= self._deadline_s:
            raise TransferError(
                f"the owner of the KV pool received nothing for {self._deadline_s:g} s"
            )

    def written(self, grant: Grant) -> bool:
        """All of its writes that have begun are done."""
        outgoing = self._outgoing.get(grant.generation)
        return outgoing is None or self._done >= outgoing.writes

    @property
    def unsure(self) -> tuple[str, ...]:
        """None: a run that is finished has arrived."""
        return ()

    @property
    def owed(self) -> bool:
        """A write is not done."""
        return bool(self._flights)

    @property
    def quiet_since(self) -> float | None:
        """Since when (time.monotonic) no write has ended; None if there is none."""
        return self._progress if self._flights else None

    def stop(self, why: str) -> None:
        """From any thread: what waits here raises TransferError soon."""
        self.stopped = why

    def close(self) -> None:
        """Leave: the owner destroys the door. Writes under way end somewhere."""
        if self._knock is not None:
            self._knock.close(Close().encode())
        if self._agent is not None:
            self._agent.close()
        self._knock = self._agent = None
        self._view = memoryview(b"")  # whoever still packs in another thread has the buffer

    def _of(self, grant: Grant) -> _Outgoing:
        check_grant(grant, self._epoch, closed=self._agent is None)
        fresh = _Outgoing([{} for _ in self._layout.layers])
        outgoing = self._outgoing.setdefault(grant.generation, fresh)
        if outgoing.broken:
            raise TransferError(f"{grant.run}: an earlier part of this fill was not sent")
        return outgoing

    def _places(
        self, layer: int, place: int, target: Sequence[int]
    ) -> tuple[list[Memory], list[Memory]]:
        """Where the blocks lie in the buffer, from `place` on, and where they belong in the pool."""
        ours, theirs = self._buffer.data_ptr() + place, self._opened.slabs[layer]
        source: list[Memory] = []
        aim: list[Memory] = []
        keys, values = self._layout.key_block_bytes(layer), self._layout.value_block_bytes(layer)
        for size, before, there in (
            (keys, 0, 0),
            (values, len(target) * keys, self._blocks * keys),
        ):
            for part in stretches(range(len(target)), target, len(target)):
                source.append((ours + before + part.source * size, part.count * size))
                aim.append((theirs + there + part.target * size, part.count * size))
        return source, aim

    def _take(self, size: int) -> int:
        """Wait for room: in the window, then in the buffer."""
        self._wait(lambda: not self._flights or self._bytes + size <= self._window)
        while (place := self._ring.take(size)) is None:
            self._wait(lambda: True)
            time.sleep(PAUSE_S)
        return place

    def _begin(
        self, source: Sequence[Memory], target: Sequence[Memory], ring: Ring, place: int, size: int
    ) -> None:
        try:
            request, now = self.write(source, target), time.monotonic()
        except TransferError as error:
            self.stopped = str(error)
            raise
        if not self._flights:
            self._progress = now
        self._flights.append(_Flight(request, ring, place, size, now))
        self._begun += 1
        self._bytes += size

    def _write(self, source: Sequence[Memory], target: Sequence[Memory]) -> int:
        assert self._agent is not None  # checked by tend(), before there is room
        return self._agent.write(self._peer, source, target)

    def _wait(self, over: Callable[[], bool]) -> None:
        """Until it is over. TransferError if the way is lost."""
        self.tend()
        while not over():
            time.sleep(PAUSE_S)
            self.tend()
