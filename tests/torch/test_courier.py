"""Couriers and lanes over a real proxy: what a way that is cut, silent, half-open or slow does to its
writer."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer import base
from baton.transfer.base import Link, Writer
from baton.transfer.courier import QUEUE_BYTES, Courier, Lost, Opened, Sent, Stopped
from baton.transfer.frames import FramesExport
from baton.transfer.frames_link import FramesLink
from baton.transfer.lanes import Lane, next_window
from baton.transfer.packing import Gathered
from baton.transfer.pieces import rows
from baton.transfer.slabs import Slabs, allocate_slabs
from baton.wire.messages import WayLost
from prefill_worker import ways as ways_module
from prefill_worker.ways import Ways
from tests.patience import PATIENCE_S, patiently
from tests.torch.owners import KEYS
from tools.faults.proxy import Faults, Proxy

LAYOUT = KVLayout(tuple(LayerShape(8, 64, 64) for _ in range(8)), 16, "float32")  # 64 KiB a block
BLOCKS = 128
T = TypeVar("T")
CPU = torch.device("cpu")


class Pool:
    """A decode worker's pool whose loop is a thread, behind a proxy."""

    def __init__(self, proxied: Callable[[Region], Region]) -> None:
        self.slabs: Slabs = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=False)
        owner = base.Owner("epoch-1", None, "127.0.0.1", KEYS)
        self.export = FramesExport(self.slabs, owner, tcp=True)
        self.region = proxied(self.export.region)
        self.reads = threading.Event()
        self.reads.set()
        self.granted = 0
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        while not self._ends.is_set():
            self.reads.wait(0.1)
            if self.reads.is_set():
                self.export.wakeups()[0].poll(5)
                with self._lock:
                    self.export.poll()

    def grant(self, *blocks: int) -> Grant:
        with self._lock:
            self.granted += 1
            grant = Grant("d0", "epoch-1", f"r{self.granted}#0", self.granted, blocks)
            self.export.expect(grant)
            return grant

    def settle(self, grant: Grant, receipt: Receipt) -> Arrival:
        def settled() -> Arrival | None:
            with self._lock:
                arrival = self.export.arrival(grant, receipt)
            return None if arrival is Arrival.PENDING else arrival

        return until(settled)

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        self.export.close()
        self.slabs.close()


def until(look: Callable[[], T | None], what: str = "what the test waits for") -> T:
    """What it finds; looks again and again."""
    for _ in patiently(what):
        if (found := look()) is not None:
            return found
        time.sleep(0.005)
    raise AssertionError("patiently() ends no loop")


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    """One for each lane of `pool`."""
    made: list[Proxy] = []
    yield made
    for each in made:
        each.__exit__()


@pytest.fixture
def pool(proxies: list[Proxy]) -> Iterator[Pool]:
    def proxied(region: Region) -> Region:
        ports = [int(each.rpartition(b":")[2]) for each in region.address["endpoints"]]
        proxies.extend(Proxy(port).__enter__() for port in ports)
        endpoints = [f"tcp://127.0.0.1:{proxy.port}".encode() for proxy in proxies]
        return replace(region, address={**region.address, "endpoints": endpoints})

    made = Pool(proxied)
    yield made
    made.close()


def misbehave(proxies: list[Proxy], faults: Faults) -> None:
    for proxy in proxies:
        proxy.faults = faults


def open_link(pool: Pool, deadline_s: float = PATIENCE_S) -> FramesLink:
    link = FramesLink(pool.region, LAYOUT, Writer(CPU, KEYS, PATIENCE_S))
    link._lanes._deadline_s = deadline_s  # connecting may take longer
    return link


def courier_to(pool: Pool, deadline_s: float = PATIENCE_S) -> Courier:
    return Courier(lambda: open_link(pool, deadline_s), LAYOUT, "epoch-1")


def news(courier: Courier) -> Opened | Sent | Lost:
    return until(lambda: next(iter(courier.poll()), None))  # type: ignore[return-value]


def source() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = LAYOUT.slab_bytes(BLOCKS)[:-1]
    return [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]


def push(courier: Courier, grant: Grant, slabs: list[torch.Tensor]) -> None:
    for layer, slab in enumerate(slabs):
        courier.push(grant, layer, slab, grant.blocks, grant.blocks)
    courier.finish(grant, grant.blocks)


def test_a_courier_delivers_what_was_pushed_though_its_source_is_reused(pool: Pool) -> None:
    courier, grant, slabs = courier_to(pool), pool.grant(3, 1, 7), source()
    opened = news(courier)
    assert isinstance(opened, Opened)
    assert (opened.transport, opened.why) == ("frames_tcp", "")
    reused = [slab.clone() for slab in slabs]
    push(courier, grant, reused)
    for slab in reused:
        slab.zero_()
    sent = news(courier)
    assert isinstance(sent, Sent)
    assert pool.settle(grant, sent.receipt) is Arrival.READY
    assert holds_blocks(pool, slabs, grant)
    until(lambda: None if courier.busy else True)  # the owner has acknowledged everything
    courier.close()


def holds_blocks(pool: Pool, slabs: list[torch.Tensor], grant: Grant) -> bool:
    for layer, slab in enumerate(slabs):
        there, wanted = (rows(LAYOUT, layer, each) for each in (pool.slabs.tensors[layer], slab))
        blocks = list(grant.blocks)
        if not there.keys[blocks].equal(wanted.keys[blocks]):
            return False
        if not there.values[blocks].equal(wanted.values[blocks]):
            return False
    return True


@pytest.mark.parametrize("blocks", [2, BLOCKS])
def test_a_silent_way_is_lost_whether_its_bytes_fit_the_buffers_or_not(
    pool: Pool, proxies: list[Proxy], blocks: int
) -> None:
    """64 MiB and more fit no TCP window, 1 MiB does: then all is sent, and nobody hears of it."""
    now, link = 0.0, open_link(pool, 10.0)
    link._lanes._clock = lambda: now
    courier = Courier(lambda: link, LAYOUT, "epoch-1")
    assert isinstance(news(courier), Opened)
    misbehave(proxies, Faults(silent=True))
    push(courier, pool.grant(*range(blocks)), source())
    small = blocks == 2
    if small:
        assert isinstance(news(courier), Sent)
    until(lambda: link.owed or None)
    now = 10.0
    assert news(courier) == Lost(
        "the owner of the KV pool received nothing for 10 s", ("r1#0",) if small else ()
    )
    assert courier.poll() == []
    courier.close()


@pytest.mark.parametrize("half", [False, True])
def test_a_way_that_is_cut_is_lost_and_another_one_works(
    pool: Pool, proxies: list[Proxy], half: bool
) -> None:
    courier, grant = courier_to(pool), pool.grant(1)
    assert isinstance(news(courier), Opened)
    proxies[0].cut(half=half)  # one of four
    push(courier, grant, source())
    found = news(courier)
    while isinstance(found, Sent):
        found = news(courier)
    assert isinstance(found, Lost)
    courier.close()
    again, grant = courier_to(pool), pool.grant(2)
    assert isinstance(news(again), Opened)
    push(again, grant, source())
    sent = news(again)
    assert isinstance(sent, Sent)
    assert pool.settle(grant, sent.receipt) is Arrival.READY
    again.close()


def test_bits_that_flip_on_the_wire_never_arrive_as_kv(pool: Pool, proxies: list[Proxy]) -> None:
    """In a payload the fill is bad; in a header, or a length of ZeroMQ's, the way is lost. Neither way is
    it READY with a byte that nobody sent."""
    courier, grant, slabs = courier_to(pool, 2.0), pool.grant(*range(16)), source()
    assert isinstance(news(courier), Opened)
    misbehave(proxies, Faults(flip=1.0))  # a bit of each chunk that passes
    push(courier, grant, slabs)
    found = news(courier)
    if isinstance(found, Sent):
        arrival = pool.settle(grant, found.receipt) if not lost(courier) else Arrival.LOST
        assert arrival in (Arrival.BAD, Arrival.LOST)
    assert sum(proxy.flipped for proxy in proxies) > 0
    courier.close()


def lost(courier: Courier) -> bool:
    """Whether the way is lost, once nothing more is to be heard of it."""
    heard: list[object] = []

    def over() -> bool | None:
        heard.extend(courier.poll())
        return True if heard or not courier.busy else None

    until(over)
    return any(isinstance(each, Lost) for each in heard)


def test_a_slow_way_is_used_as_long_as_something_arrives(pool: Pool, proxies: list[Proxy]) -> None:
    """16 MiB at 4 MB/s take longer than the deadline."""
    courier, grant = courier_to(pool, 3.0), pool.grant(*range(32))
    assert isinstance(news(courier), Opened)
    misbehave(proxies, Faults(bytes_per_s=1_000_000))  # of each of four connections
    push(courier, grant, source())
    sent = news(courier)
    assert isinstance(sent, Sent)
    assert pool.settle(grant, sent.receipt) is Arrival.READY
    courier.close()


def test_a_slow_way_is_attached_with_a_probe_that_ends_in_time(
    pool: Pool, proxies: list[Proxy]
) -> None:
    """10 Mbit/s and 50 ms: 16 MiB would take 13 s."""
    misbehave(proxies, Faults(delay_s=0.05, bytes_per_s=1_250_000))
    link = open_link(pool)
    began = link._lanes.marks()
    assert 0 < link.probe() < 0.1
    assert sum(link._lanes.marks()) - sum(began) < 8
    link.close()


def test_a_probe_that_nobody_answers_says_nothing_and_the_way_is_open(pool: Pool) -> None:
    link = open_link(pool)
    pool.reads.clear()
    assert link.probe() == 0.0
    pool.reads.set()
    courier = Courier(lambda: link, LAYOUT, "epoch-1")
    assert isinstance(news(courier), Opened)
    courier.close()


def test_a_courier_takes_no_more_than_its_queue_and_gives_up_when_it_is_told_to(
    pool: Pool,
) -> None:
    courier, slabs = courier_to(pool), source()
    assert isinstance(news(courier), Opened)
    pool.reads.clear()
    grant, pushed = pool.grant(*range(BLOCKS)), 0
    while courier.takes:
        courier.push(grant, pushed % 8, slabs[pushed % 8], grant.blocks, grant.blocks)
        pushed += 1
    assert QUEUE_BYTES <= pushed * BLOCKS * LAYOUT.block_bytes // 8 < QUEUE_BYTES + (128 << 20)
    until(lambda: courier.quiet_s() > 0 or None)
    courier.give_up("others need the room")
    assert news(courier) == Lost("others need the room", ())
    courier.close()
    pool.reads.set()


def test_what_cannot_be_opened_says_why(proxies: list[Proxy]) -> None:
    def fail() -> Link:
        raise TransferError("no way")

    courier = Courier(fail, LAYOUT, "epoch-1")
    assert news(courier) == Lost("no way")
    assert not courier.busy
    courier.close()
    with pytest.raises(TransferError, match="closed"):
        courier.finish(Grant("d0", "epoch-1", "r1#0", 1, (1,)), [1])


def test_a_fill_that_was_abandoned_is_not_finished_and_the_next_one_is(pool: Pool) -> None:
    courier, slabs = courier_to(pool), source()
    assert isinstance(news(courier), Opened)
    first, second = pool.grant(*range(64)), pool.grant(*range(64, 70))
    for layer, slab in enumerate(slabs):
        courier.push(first, layer, slab, first.blocks, first.blocks)
    courier.abandon(first)
    push(courier, second, slabs)
    sent = news(courier)
    assert isinstance(sent, Sent)
    assert sent.grant == second
    assert pool.settle(second, sent.receipt) is Arrival.READY
    courier.close()


# ---- a prefill worker's ways


def test_ways_tell_what_becomes_of_them_and_give_up_one_that_holds_the_room_of_others(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(lambda worker, epoch, regions: courier_to(pool))
    assert ways.attach("d0", "epoch-1", [pool.region]) is None
    assert ways.get("d0") is None
    assert ways.busy
    (attached,) = until(lambda: ways.poll() or None)
    assert (attached.worker, attached.epoch) == ("d0", "epoch-1")  # type: ignore[union-attr]
    until(lambda: None if ways.busy else True)
    ways.make_room()
    assert ways.poll() == []
    pool.reads.clear()
    way, grant, slabs = ways.to("d0"), pool.grant(*range(BLOCKS)), source()
    assert isinstance(way, Courier)
    for turn in range(QUEUE_BYTES // (BLOCKS * LAYOUT.block_bytes) + 8):
        way.push(grant, turn % 8, slabs[turn % 8], grant.blocks, grant.blocks)
    until(lambda: way.quiet_s() > 0 or None)
    monkeypatch.setattr(ways_module, "PINCHED_S", 0.0)
    ways.make_room()
    (lost,) = ways.poll()
    assert isinstance(lost, WayLost)
    assert (lost.worker, lost.epoch, lost.runs) == ("d0", "epoch-1", ())
    with pytest.raises(TransferError, match="no link to d0"):
        ways.to("d0")
    pool.reads.set()
    ways.close()


# ---- the window


def test_a_courier_is_busy_until_the_owner_has_read_what_was_sent(pool: Pool) -> None:
    courier, grant = courier_to(pool), pool.grant(3, 1)
    assert courier.busy, "it has not said yet whether the link works"
    assert isinstance(news(courier), Opened)
    until(lambda: None if courier.busy else True)
    with pool._lock:  # the owner reads nothing
        push(courier, grant, source())
        assert isinstance(news(courier), Sent)
        assert courier.busy, "the way may still fail"
    until(lambda: None if courier.busy else True)
    courier.abandon(grant)
    assert not courier.busy
    courier.close()
    courier.join(PATIENCE_S)


def test_the_window_follows_the_age_of_what_is_acknowledged() -> None:
    assert next_window(100, 50, 0.01, 120) == 120
    assert next_window(100, 10, 0.01, 120) == 110
    assert next_window(100, 10, 0.5, 120) == 100
    assert next_window(100, 10, 2.0, 120) == 50
    assert next_window(1, 1, 2.0, 120) == 1


def test_a_lane_counts_what_is_on_its_way_and_believes_no_impossible_ack() -> None:
    lane = Lane(None, None, most=100, window=100)  # type: ignore[arg-type]
    assert lane.has_room(1000)  # or a frame larger than the window would never be sent
    lane.add(60, 1.0)
    assert lane.has_room(40)
    assert not lane.has_room(41)
    assert not lane.take(2, 1.0)
    assert lane.take(1, 3.0)
    assert (lane.on_its_way, lane.bytes, lane.window) == (0, 0, 50)
    assert not lane.take(1, 3.0)


# ---- a link whose writes take their time


class SlowToWrite:
    """A link that has written a fill when it is told so."""

    transport, why, slabs, tend_s = "slow", "", None, 0.001
    unsure: tuple[str, ...] = ()
    quiet_since: float | None = None

    def __init__(self) -> None:
        self.pushed: list[int] = []  # generations, in order
        self.ready: set[int] = set()
        self.ended: list[int] = []

    @property
    def owed(self) -> bool:
        return bool(set(self.pushed) - self.ready)

    def written(self, grant: Grant) -> bool:
        return grant.generation in self.ready

    def pack(self, layer: int, slab: torch.Tensor, *places: object) -> Gathered:
        return Gathered(slab.clone())

    def drop(self, packed: object) -> None:
        pass

    def push_packed(self, grant: Grant, *given: object) -> None:
        self.pushed.append(grant.generation)

    def push(self, grant: Grant, *given: object) -> None:
        self.pushed.append(grant.generation)

    def finish(self, grant: Grant, blocks: tuple[int, ...]) -> Receipt:
        self.ended.append(grant.generation)
        return Receipt(0, b"", 0.0, self.transport)

    def abandon(self, grant: Grant) -> None:
        self.ended.append(grant.generation)

    def tend(self) -> None:
        pass

    def stop(self, why: str) -> None:
        pass

    def probe(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


def test_a_fill_that_is_not_written_yet_holds_up_no_other() -> None:
    link = SlowToWrite()
    courier = Courier(lambda: link, LAYOUT, "epoch-1", writes=True)  # type: ignore[arg-type, return-value]
    slab = torch.zeros(LAYOUT.slab_bytes(4)[0], dtype=torch.uint8)
    first, second = (Grant("d0", "epoch-1", f"r{n}#0", n, (n,)) for n in (1, 2))
    told: list[object] = []

    def hear(kind: type) -> object | None:
        told.extend(courier.poll())
        return next((each for each in told if isinstance(each, kind)), None)

    courier.push(first, 0, slab, [1], [1])
    courier.finish(first, [1])
    courier.push(second, 0, slab, [2], [2])
    assert courier.abandon(second)
    until(lambda: True if link.pushed[:1] == [1] else None)
    assert link.ended == []
    link.ready.add(2)  # in order: the second waits for the first
    courier.push(Grant("d0", "epoch-1", "r3#0", 3, (3,)), 0, slab, [3], [3])
    until(lambda: True if link.pushed[-1] == 3 else None)
    assert link.ended == []
    link.ready |= {1, 3}
    assert until(lambda: hear(Stopped)) == Stopped(second)
    assert hear(Sent) is not None
    assert link.ended == [1, 2]
    courier.close()
    courier.join(PATIENCE_S)
