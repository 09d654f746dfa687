"""NIXL between real processes: deadlines, doors, and writers that are shut out.

tests/pure/test_shut_out.py has the protocol around them."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgpack
import pytest
import torch
import zmq

from baton.errors import InputError, TransferError
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Region
from baton.transfer import base
from baton.transfer.base import Link
from baton.transfer.courier import Courier, Lost, News, Opened, Sent, Stopped
from baton.transfer.curve import CurveKeys
from baton.transfer.nixl import NixlExport
from baton.transfer.nixl_agent import interface_of, way_to
from baton.transfer.nixl_doors import Close, Open, Refused, decode
from baton.transfer.nixl_doors import Opened as DoorOpened
from baton.transfer.nixl_link import NixlLink, Ring
from baton.transfer.registry import open_link, open_way
from baton.transfer.slabs import allocate_slabs
from decode_worker.process import _kinds
from tests.nixl_here import NIXL, WITHOUT_NIXL
from tests.patience import PATIENCE_S, patiently
from tests.torch.owners import (
    KEYS,
    LAYOUT,
    Owner,
    fill,
    holds,
    reference,
    snapshot,
    unchanged,
)

TRANSPORT = "nixl"
T = TypeVar("T")
with_nixl = pytest.mark.skipif(not NIXL, reason=WITHOUT_NIXL)


# ---- without NIXL


def test_a_ring_gives_room_that_nobody_else_has() -> None:
    dice, ring, taken, over = random.Random(1), Ring(1000, 100), [], set()
    for _ in range(3000):
        if taken and dice.random() < 0.45:
            given = dice.choice([0, 0, len(taken) - 1])  # in order, or not
            over.add(taken[given])
            ring.give_back(1000 + taken[given][0])
            while taken and taken[0] in over:
                over.discard(taken.pop(0))
            continue
        size = dice.randint(1, 60)
        place = ring.take(size)
        if place is not None:
            place -= 1000
            assert 0 <= place <= 100 - size
            assert all(place >= end or place + size <= first for first, end in taken)
            taken.append((place, place + size))
        else:
            assert taken  # an empty ring has room for anything that fits
    assert Ring(0, 10).take(11) is None


def test_what_is_said_at_a_door_is_read_back_and_anything_else_is_not() -> None:
    for each in (Open("e", "p0"), DoorOpened(b"\x00m", (1, 2**47), 3), Refused("no"), Close()):
        assert decode(each.encode()) == each
    dice, good = random.Random(2), Open("e", "p0").encode()
    for _ in range(500):
        spoilt = bytearray(good)
        spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
        assert not isinstance(decode(bytes(spoilt)), DoorOpened)
    for junk in ([1, "opened", b"", [-1], 0], [1, "opened", b"", [True], 0], [2, "close"], [], 7):
        assert decode(msgpack.packb(junk)) is None
    assert decode(b"\x91" * 100_000) is None


def test_an_address_has_the_interface_that_carries_it() -> None:
    assert interface_of("127.0.0.2") == way_to("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    assert way_to("no such host") is None


def test_what_cannot_be_is_refused_before_nixl_is_asked() -> None:
    with pytest.raises(InputError, match="--kv-transport nixl needs a socket: give --kv-host"):
        _kinds("nixl", Path("/tmp"), None)
    slabs = allocate_slabs(LAYOUT, 2, "cpu", shared=False)
    abroad = base.Owner("e", None, "127.0.0.1", KEYS)
    for wrong, owner, match in [
        (replace(slabs, device=torch.device("cuda:1")), abroad, "the pool is on cuda:1"),
        (slabs, replace(abroad, bind_host="0.0.0.0"), "one address of this machine"),
        (slabs, replace(abroad, keys=None), "needs CURVE keys"),
    ]:
        with pytest.raises(TransferError, match=match):
            NixlExport(wrong, owner)


# ---- doors


def link_of(owner: Owner, writer: str, deadline_s: float = 5.0, **changes: object) -> Link:
    region = owner.export.region
    region = replace(region, address={**region.address, **changes})  # type: ignore[dict-item]
    asked = {"writer": writer, "wanted": "nixl", "deadline_s": deadline_s}
    return open_link([region], LAYOUT, device="cpu", keys=KEYS, **asked)  # type: ignore[arg-type]


def until(found: Callable[[], T | None]) -> T:
    for _ in patiently("what the test waits for"):
        if (it := found()) is not None:
            return it
        time.sleep(0.002)
    raise AssertionError("patiently() ends no loop")


@with_nixl
def test_a_writer_that_is_shut_out_writes_nothing_more(owner: Owner) -> None:
    link, other = link_of(owner, "p1"), link_of(owner, "p2")
    owner.export.let_in("p1")  # type: ignore[attr-defined]
    owner.export.let_in("p2")  # type: ignore[attr-defined]
    grant = owner.grant(1, 2)
    assert owner.settle(grant, fill(link, grant, reference(1))) is Arrival.READY
    owner.export.shut_out("p1")  # type: ignore[attr-defined]
    before, late = snapshot(owner), owner.grant(3, 4, expect=False)
    with pytest.raises(TransferError):
        fill(link, late, reference(2))
    assert unchanged(owner, before)
    last = owner.grant(5)  # another writer has its own door
    assert owner.settle(last, fill(other, last, reference(3))) is Arrival.READY
    link.close()
    other.close()


@with_nixl
def test_a_second_door_ends_the_first_and_stays_until_it_is_used(owner: Owner) -> None:
    first, second = link_of(owner, "p1"), link_of(owner, "p1")
    with pytest.raises(TransferError):
        fill(first, owner.grant(1, 2), reference(1))
    owner.export.shut_out("p1")  # type: ignore[attr-defined]  # meant for the first, and late
    grant = owner.grant(3, 4)
    assert owner.settle(grant, fill(second, grant, reference(2))) is Arrival.READY
    first.close()  # it is not its door any more
    again = owner.grant(5)
    assert owner.settle(again, fill(second, again, reference(3))) is Arrival.READY
    second.close()


@with_nixl
def test_strangers_and_writers_of_another_life_get_no_door(owner: Owner) -> None:
    with pytest.raises(TransferError, match="epoch"):
        link_of(owner, "p1", epoch="epoch-0")
    region = owner.export.region
    stranger = CurveKeys(*zmq.curve_keypair(), frozenset([KEYS.public]))
    asked = {"writer": "p1", "wanted": "nixl", "keys": stranger, "deadline_s": 2.0}
    with pytest.raises(TransferError, match="refused this process's key"):
        open_link([region], LAYOUT, device="cpu", **asked)  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="wanted auto, offered nixl"):
        open_link([region], LAYOUT, device="cpu", writer="p1", keys=KEYS)


@with_nixl
def test_a_probe_tells_a_speed_and_touches_no_block(owner: Owner) -> None:
    link, before = link_of(owner, "p1"), snapshot(owner)
    assert link.probe() > 0
    assert unchanged(owner, before)
    link.close()


# ---- by a courier


def news_of(courier: Courier, kind: type[T]) -> T:
    def found() -> T | None:
        seen: list[News] = courier.poll()
        assert not any(isinstance(each, Lost) for each in seen) or kind is Lost, seen
        return next((each for each in seen if isinstance(each, kind)), None)

    return until(found)


@with_nixl
def test_a_courier_says_when_it_has_sent_and_when_it_has_stopped(owner: Owner) -> None:
    way = open_way(
        [owner.export.region],
        LAYOUT,
        epoch=owner.epoch,
        device="cpu",
        writer="p1",
        wanted="nixl",
        keys=KEYS,
    )
    assert isinstance(way, Courier)
    assert news_of(way, Opened).transport == "nixl"
    owner.export.let_in("p1")  # type: ignore[attr-defined]
    grant, dropped, source = owner.grant(1, 2), owner.grant(3, 4), reference(1)
    for layer, slab in enumerate(source):
        way.push(grant, layer, slab, [1, 2], [1, 2])
        way.push(dropped, layer, slab, [3, 4], [3, 4])
    assert way.abandon(dropped)  # it goes on: Stopped tells
    way.finish(grant, [1, 2])
    told: list[News] = []

    def both() -> bool | None:
        told.extend(way.poll())
        return True if {Sent, Stopped} <= {type(each) for each in told} else None

    until(both)
    (sent,) = [each for each in told if isinstance(each, Sent)]
    assert owner.settle(grant, sent.receipt) is Arrival.READY
    assert holds(owner, source, [1, 2])
    owner.export.shut_out("p1")  # type: ignore[attr-defined]
    way.push(owner.grant(5), 0, source[0], [5], [5])
    assert news_of(way, Lost).why
    way.close()


# ---- an owner that does not answer

OWNER = """
import sys, tempfile, msgpack
from pathlib import Path
import tests.torch.owners as owners
public, secret = msgpack.unpackb(bytes.fromhex(sys.stdin.readline()))
owners.KEYS = owners.CurveKeys(public, secret)
with tempfile.TemporaryDirectory() as folder:
    owner = owners.make_owner("nixl", Path(folder))
    region = owner.export.region
    plain = [region.transport, region.layout, region.blocks, dict(region.address)]
    print(msgpack.packb(plain).hex(), flush=True)
    sys.stdin.read()
"""


@with_nixl
def test_an_owner_that_stops_or_dies_is_given_up_and_nothing_hangs() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgpack.packb([KEYS.public, KEYS.secret]).hex().encode() + b"\n")
        process.stdin.flush()
        region = Region(*msgpack.unpackb(bytes.fromhex(process.stdout.readline().decode())))
        asked = {"writer": "p1", "wanted": "nixl", "deadline_s": 2.0}
        link = open_link([region], LAYOUT, device="cpu", keys=KEYS, **asked)  # type: ignore[arg-type]
        assert isinstance(link, NixlLink)
        fill(link, Grant("d0", "epoch-1", "r1#0", 1, (1, 2)), reference(1))
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # all of its threads have stopped
        stuck = Grant("d0", "epoch-1", "r2#0", 2, (3, 4))
        for layer, slab in enumerate(reference(1)):
            link.push(stuck, layer, slab, [3, 4], [3, 4])
        assert link.owed
        assert link.quiet_since is not None
        with pytest.raises(TransferError, match="received nothing for 2 s"):
            link.finish(stuck, [3, 4])
        with pytest.raises(TransferError):  # so it cannot say that it has stopped
            link.abandon(stuck)
        process.kill()
        process.wait(PATIENCE_S)
        with pytest.raises(TransferError):
            until(lambda: link.tend())  # type: ignore[func-returns-value]
        link.close()
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdin.close()
        process.stdout.close()


# ---- a link that is cut


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    name = f"baton-try-{os.getpid()}"
    ip = shutil.which("ip")
    if os.geteuid() != 0 or ip is None:
        return False
    made = subprocess.run([ip, "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run([ip, "netns", "del", name]).returncode == 0


class Side:
    """A process of nixl_sides.py in a network namespace."""

    def __init__(self, namespace: str, role: str, where: str) -> None:
        plain = msgpack.packb([KEYS.public, KEYS.secret]).hex()
        inside = ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.torch.nixl_sides"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*inside, role, where, plain], stdin=pipe, stdout=pipe)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def say(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two, joined by a cable: 10.78.0.1 and 10.78.0.2, both on veth0."""
    here, there = f"baton-{os.getpid()}-a", f"baton-{os.getpid()}-b"
    ip(f"netns add {here}")
    ip(f"netns add {there}")
    ip(f"-n {here} link add veth0 type veth peer name veth0 netns {there}")
    for name, number in ((here, 1), (there, 2)):
        ip(f"-n {name} address add 10.78.0.{number}/24 dev veth0")
        ip(f"-n {name} link set lo up")
        ip(f"-n {name} link set veth0 up")
    yield here, there
    ip(f"netns del {here}")
    ip(f"netns del {there}")


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@with_nixl
@pytest.mark.skipif(not can_make_namespaces(), reason="makes network namespaces, as root, by `ip`")
@pytest.mark.parametrize("shut_out", [True, False])
def test_what_is_sent_before_a_cut_lands_after_it_unless_the_writer_is_shut_out(
    namespaces: tuple[str, str], shut_out: bool
) -> None:
    here, there = namespaces
    owner = Side(here, "owner", "10.78.0.1")
    writer = Side(there, "writer", owner.line())
    try:
        assert writer.say("open") == "done"
        owner.say("let-in")
        assert writer.say("fill 1 1 2 3") == "done"
        assert owner.say("holds 1 1 2 3") == "True"
        ip(f"-n {there} link set veth0 down")
        assert writer.say("push 2 4") == "done"  # it is on its way now, and nobody can take it back
        assert "received nothing for 2 s" in writer.say("settle 0")
        owner.say("noise")
        if shut_out:
            owner.say("shut-out")
        ip(f"-n {there} link set veth0 up")
        if not shut_out:  # the danger is real
            until(lambda: True if owner.say("holds 2 4") == "True" else None)
        assert writer.say("close") == "done"
        until(lambda: True if writer.say("open") == "done" else None)  # once the cable carries
        assert writer.say("fill 3 1 2") == "done"
        assert owner.say("holds 3 1 2") == "True"
        assert owner.say("holds 99 4") == str(shut_out)
    finally:
        writer.close()
        owner.close()
