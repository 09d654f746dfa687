"""One contract, every transport: what arrives is what was sent, or it is BAD."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import torch
import zmq

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.transfer.in_place import NAME as IN_PLACE
from baton.transfer.pieces import rows
from baton.transfer.registry import open_link
from tests.nixl_here import NIXL, WITHOUT_NIXL
from tests.patience import PATIENCE_S
from tests.torch.faulty import Fault, FaultyLink
from tests.torch.owners import (
    BLOCKS,
    KEYS,
    LAYOUT,
    PUBLIC,
    SECRET,
    Owner,
    fill,
    holds,
    make_owner,
    reference,
    snapshot,
    unchanged,
    write,
)

TRANSPORTS = (IN_PLACE, "shm", "frames", "frames_tcp", "pinned", *(["nixl"] if NIXL else []))
BETWEEN_PROCESSES = TRANSPORTS[1:]
COPYING = ("frames", "frames_tcp", "pinned")


@pytest.fixture(
    params=[
        *(each for each in TRANSPORTS if each != "nixl"),
        pytest.param("nixl", marks=pytest.mark.skipif(not NIXL, reason=WITHOUT_NIXL)),
    ]
)
def owner(request: pytest.FixtureRequest, folder: Path) -> Iterator[Owner]:
    made = make_owner(request.param, folder)
    yield made
    made.close()


@pytest.fixture(params=COPYING)
def copying(request: pytest.FixtureRequest, folder: Path) -> Iterator[Owner]:
    made = make_owner(request.param, folder)
    yield made
    made.close()


# ---- what arrives


def test_what_was_pushed_is_in_the_pool(owner: Owner) -> None:
    link, source = owner.link(), reference(1)
    grant = owner.grant(7, 3, 4, 5, 20, 0, 23)
    receipt = fill(link, grant, source)
    assert owner.settle(grant, receipt) is Arrival.READY
    assert holds(owner, source, grant.blocks)
    assert (receipt.moved_bytes == 0) == (link.slabs is not None)
    assert not owner.export.dropped
    link.close()


def test_blocks_outside_the_grant_are_untouched(owner: Owner) -> None:
    before = reference(5)
    for slab, noise in zip(owner.slabs.tensors, before, strict=False):
        slab.copy_(noise)
    link, grant = owner.link(), owner.grant(1, 2, 22)
    assert owner.settle(grant, fill(link, grant, reference(2))) is Arrival.READY
    others = [block for block in range(BLOCKS) if block not in grant.blocks]
    assert holds(owner, before, others)
    link.close()


def test_room_for_generation_need_not_be_filled(owner: Owner) -> None:
    link, grant = owner.link(), owner.grant(4, 9, 2)
    receipt = fill(link, grant, reference(3), blocks=[4, 9])
    assert owner.settle(grant, receipt, needed=[4, 9]) is Arrival.READY
    assert owner.settle(grant, receipt) is Arrival.BAD
    assert sum(owner.export.dropped.values()) == 1
    link.close()


def test_a_run_with_nothing_to_fill_is_ready(owner: Owner) -> None:
    link, grant = owner.link(), owner.grant(4)
    assert owner.settle(grant, link.finish(grant, []), needed=[]) is Arrival.READY
    link.close()


def test_two_writers_fill_at_the_same_time(owner: Owner) -> None:
    links, sources = [owner.link(), owner.link()], [reference(1), reference(2)]
    grants = [owner.grant(1, 2, 3), owner.grant(4, 5, 6)]
    for layer in range(3):
        for link, source, grant in zip(links, sources, grants, strict=True):
            write(link, grant, layer, source[layer], grant.blocks)
    for link, source, grant in zip(links, sources, grants, strict=True):
        assert owner.settle(grant, link.finish(grant, grant.blocks)) is Arrival.READY
        assert holds(owner, source, grant.blocks)
        link.close()


def test_the_same_blocks_are_filled_again_under_a_new_grant(owner: Owner) -> None:
    link = owner.link()
    for seed in range(3):
        grant, source = owner.grant(8, 9), reference(seed)
        assert owner.settle(grant, fill(link, grant, source)) is Arrival.READY
        assert holds(owner, source, [8, 9])
        owner.export.retire(grant)
    link.close()


# ---- what does not


def test_an_unfinished_fill_is_not_ready(owner: Owner) -> None:
    link, grant = owner.link(), owner.grant(1, 2)
    fill(link, grant, reference(1), finish=False)
    other = owner.grant(3)
    receipt = fill(link, other, reference(1))
    assert owner.settle(other, receipt) is Arrival.READY
    assert owner.export.arrival(grant, receipt) is not Arrival.READY
    link.abandon(grant)
    link.close()


def test_the_receipt_of_another_fill_is_bad(owner: Owner) -> None:
    link, first = owner.link(), owner.grant(1, 2)
    old = fill(link, first, reference(1))
    assert owner.settle(first, old) is Arrival.READY
    owner.export.retire(first)
    second = owner.grant(1, 2)
    fill(link, second, reference(2))
    owner.drain(link, 9)
    assert owner.settle(second, old) is Arrival.BAD
    link.close()


def test_a_grant_that_is_over_is_never_ready(owner: Owner) -> None:
    link, grant = owner.link(), owner.grant(1, 2)
    receipt = fill(link, grant, reference(1))
    owner.export.retire(grant)
    assert owner.export.arrival(grant, receipt) is Arrival.BAD
    assert owner.export.dropped["unknown"] == 1
    link.close()


def test_a_late_push_changes_nothing(copying: Owner) -> None:
    link, grant = copying.link(), copying.grant(1, 2)
    copying.export.retire(grant)
    before = snapshot(copying)
    receipt = fill(link, grant, reference(1))
    before[-1].view(torch.int64)[9] = 2  # what drain() leaves: the stamp of its grant
    copying.drain(link, 9)
    for layer in range(3):
        now, then = (rows(LAYOUT, layer, s[layer]) for s in (copying.slabs.tensors, before))
        then.keys[9], then.values[9] = now.keys[9], now.values[9]
    assert unchanged(copying, before)
    assert copying.export.arrival(grant, receipt) is Arrival.BAD
    link.close()


def test_grants_of_another_life_are_refused(owner: Owner) -> None:
    link, grant = owner.link(), replace(owner.grant(1, 2), epoch="epoch-0")
    with pytest.raises(TransferError, match="epoch"):
        owner.export.expect(grant)
    with pytest.raises(TransferError, match="opened in epoch"):
        fill(link, grant, reference(1), blocks=[])
    link.close()


def test_mistakes_of_the_writer_are_refused_before_a_byte_moves(owner: Owner) -> None:
    link, grant, slab = owner.link(), owner.grant(1, 2), reference(1)[0]
    for layer, source, target, match in [
        (3, [1], [1], "layer 3"),
        (0, [1, 2], [1], "2 source blocks"),
        (0, [1], [5], "not in its grant"),
    ]:
        with pytest.raises(TransferError, match=match):
            link.push(grant, layer, slab, source, target)
    with pytest.raises(TransferError, match="not in its grant"):
        link.finish(grant, [5])
    with pytest.raises(TransferError):  # in place: another pool; else: a block it does not have
        link.push(grant, 0, slab, [BLOCKS], [1])
    link.close()
    with pytest.raises(TransferError, match="closed"):
        link.finish(grant, [1])


def test_the_owner_grants_what_it_has(owner: Owner) -> None:
    with pytest.raises(TransferError, match="outside"):
        owner.grant(BLOCKS)
    grant = owner.grant(1)
    with pytest.raises(TransferError, match="already granted"):
        owner.export.expect(replace(grant, run="other"))


# ---- faults


@pytest.mark.parametrize("fault", [Fault.FLIP, Fault.TRUNCATE, Fault.DROP_END, Fault.STALL])
def test_a_damaged_fill_is_never_ready(owner: Owner, fault: Fault) -> None:
    link, grant = FaultyLink(owner.link(), fault), owner.grant(1, 2, 3, 4)
    assert not accepted(owner, link, grant)
    link.close()


def test_what_comes_twice_counts_once(owner: Owner) -> None:
    link, grant, source = FaultyLink(owner.link(), Fault.DUPLICATE), owner.grant(1, 2), reference(1)
    receipt = fill(link, grant, source)
    assert owner.settle(grant, receipt) is Arrival.READY
    assert holds(owner, source, grant.blocks)
    link.close()


@pytest.mark.parametrize("transport", ["frames", "pinned"])
def test_a_thousand_flipped_bits_and_none_accepted(folder: Path, transport: str) -> None:
    owner = make_owner(transport, folder)
    link = FaultyLink(owner.link(), Fault.FLIP, seed=7)
    for _ in range(1000):
        grant = owner.grant(2, 3, 5)
        assert not accepted(owner, link, grant)
        owner.export.retire(grant)
    assert sum(owner.export.dropped.values()) >= 1000
    link.close()
    owner.close()


def accepted(owner: Owner, link: FaultyLink, grant: Grant) -> bool:
    """Is a faulty fill READY, once everything the link has sent has been looked at?"""
    fault = link.fault
    receipt = fill(link, grant, reference(1))
    link.fault = None
    answers = [owner.export.arrival(grant, receipt)]
    owner.drain(link, 9)
    answers.append(owner.export.arrival(grant, receipt))
    link.fault = fault
    stamps = owner.slabs.tensors[-1].view(torch.int64)[list(grant.blocks)]
    return Arrival.READY in answers or bool((stamps == grant.generation).all())


# ---- lives and deaths


def test_another_pool_is_not_opened_by_mistake(folder: Path) -> None:
    for transport in BETWEEN_PROCESSES:
        owner = make_owner(transport, folder)
        region = owner.export.region
        owner.close()
        asked = {"writer": "p0", "wanted": transport, "deadline_s": 0.2}
        with pytest.raises(TransferError, match=transport):
            open_link([region], LAYOUT, device="cpu", keys=KEYS, **asked)


def pool_mappings() -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "baton-kv" in line}


def test_what_stays_after_close_is_nothing(folder: Path) -> None:
    def once() -> None:
        for transport in TRANSPORTS:
            owner = make_owner(transport, folder)
            link, grant = owner.link(), owner.grant(1, 2)
            assert owner.settle(grant, fill(link, grant, reference(1))) is Arrival.READY
            link.close()
            owner.close()

    once()  # pyzmq starts a thread of its own at the first frame
    shm, fds = sorted(os.listdir("/dev/shm")), sorted(os.listdir("/proc/self/fd"))
    mappings = pool_mappings()  # of other tests in this process, perhaps
    once()
    assert sorted(os.listdir("/dev/shm")) == shm
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert pool_mappings() <= mappings
    assert not list(folder.iterdir())


def test_tensors_outlive_their_link(folder: Path) -> None:
    owner = make_owner("shm", folder)
    link = owner.link()
    assert link.slabs is not None
    kept = link.slabs[0]
    link.close()
    owner.close()
    kept.fill_(7)
    assert int(kept.sum()) == 7 * kept.numel()


WRITER = """
import sys, msgpack
from baton.kv.region import Region
from baton.kv.grant import Grant
from tests.torch.owners import *
regions, grants, public, secret = msgpack.unpackb(bytes.fromhex(sys.stdin.readline()))
links = []
for fields, grant in zip(regions, grants):
    grant = Grant(*grant[:4], tuple(grant[4]))
    keys = CurveKeys(public, secret)
    asked = {"writer": "p1", "wanted": fields[0]}
    link = open_link([Region(*fields)], LAYOUT, device="cpu", keys=keys, **asked)
    write(link, grant, 0, reference(1)[0], grant.blocks)
    links.append(link)
own = allocate_slabs(LAYOUT, BLOCKS, "cpu", shared=True)
print("half way", flush=True)
sys.stdin.read()
"""


def test_a_writer_killed_half_way_leaves_the_owner_well(folder: Path) -> None:
    shm = sorted(os.listdir("/dev/shm"))
    owners = [make_owner(transport, folder) for transport in BETWEEN_PROCESSES]
    grants = [owner.grant(1, 2, 3) for owner in owners]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    regions = [_plain(owner.export.region) for owner in owners]
    plain = [[g.worker, g.epoch, g.run, g.generation, list(g.blocks)] for g in grants]
    writer.stdin.write(msgpack.packb([regions, plain, PUBLIC, SECRET]).hex().encode() + b"\n")
    writer.stdin.flush()
    assert select.select([writer.stdout], [], [], PATIENCE_S)[0], "the writer does not speak"
    assert writer.stdout.readline() == b"half way\n"
    os.killpg(writer.pid, signal.SIGKILL)
    assert writer.wait(PATIENCE_S) == -signal.SIGKILL
    writer.stdin.close()
    writer.stdout.close()
    for owner, grant in zip(owners, grants, strict=True):
        owner.export.poll()
        forged = Receipt(0, bytes(16), 0.0)
        assert owner.export.arrival(grant, forged) is not Arrival.READY
        owner.export.retire(grant)
        link = owner.link()
        owner.drain(link, 2)
        link.close()
        owner.close()
    assert sorted(os.listdir("/dev/shm")) == shm


def _plain(region: Region) -> list[object]:
    return [region.transport, region.layout, region.blocks, dict(region.address)]


@pytest.mark.parametrize("transport", ["frames", "frames_tcp"])
def test_the_largest_frame_gets_through_encrypted_or_not(transport: str, folder: Path) -> None:
    owner = make_owner(transport, folder)
    answered = threading.Event()

    def serve() -> None:
        while not answered.is_set():
            zmq.select(list(owner.export.wakeups()), [], [], 0.1)
            owner.export.poll()

    server = threading.Thread(target=serve)
    server.start()
    link = owner.link()
    try:
        assert link.probe() > 0  # frames of exactly the largest size
    finally:
        answered.set()
        server.join()
        link.close()
        owner.close()
