"""Frames: what only a socket can get wrong."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.region import Arrival
from baton.transfer import base, frames
from baton.transfer.base import Writer
from baton.transfer.frame_codec import End, Piece, Probe, decode
from baton.transfer.frames import FramesExport
from baton.transfer.frames_link import FramesLink
from baton.transfer.lanes import Parts
from baton.transfer.registry import CurveKeys
from baton.transfer.slabs import allocate_slabs
from tests.patience import PATIENCE_MS
from tests.torch.faulty import Fault, FaultyLink
from tests.torch.owners import (
    KEYS,
    LAYOUT,
    Owner,
    fill,
    holds,
    make_owner,
    reference,
    snapshot,
    unchanged,
    write,
)

TRANSPORT = "frames"
CPU = torch.device("cpu")


def frames_link(owner: Owner) -> FramesLink:
    return FramesLink(owner.export.region, LAYOUT, Writer(CPU))


def record(link: FramesLink) -> list[Parts]:
    """What the link sends from now on."""
    sent: list[Parts] = []
    through = link.send

    def send(parts: Parts, lane: int) -> None:
        sent.append([bytes(part) for part in parts])
        through(parts, lane)

    link.send = send
    return sent


def test_a_replay_of_an_old_fill_changes_nothing(owner: Owner) -> None:
    link, old, new = frames_link(owner), reference(1), reference(2)
    sent = record(link)
    first = owner.grant(1, 2)
    assert owner.settle(first, fill(link, first, old)) is Arrival.READY
    owner.export.retire(first)
    replayed = list(sent)
    second = owner.grant(1, 2)
    assert owner.settle(second, fill(link, second, new)) is Arrival.READY
    for parts in replayed:
        link._send(parts)
    owner.drain(link, 9)
    assert holds(owner, new, [1, 2])
    assert owner.export.dropped == {"unknown": len(replayed)}
    link.close()


def test_a_replay_within_a_fill_is_dropped_and_harmless(owner: Owner) -> None:
    link, grant, source = frames_link(owner), owner.grant(1, 2), reference(1)
    sent = record(link)
    fill(link, grant, source, finish=False)
    for parts in list(sent):
        link._send(parts)
    assert owner.settle(grant, link.finish(grant, [1, 2])) is Arrival.READY
    assert holds(owner, source, [1, 2])
    assert owner.export.dropped == {"repeated": len(sent) - 1}
    link.close()


def test_frames_of_another_epoch_are_dropped(owner: Owner) -> None:
    link, grant = frames_link(owner), owner.grant(1, 2)
    before = snapshot(owner)
    link._send([Piece("epoch-0", 1, 0, 0, 0, (1,)).encode(), bytes(512)])
    link._send([End("epoch-0", 1, 0, 1, 0, 0, bytes(16), ()).encode()])
    link._send([End("epoch-1", 7, 0, 1, 0, 0, bytes(16), ()).encode()])
    while sum(owner.export.dropped.values()) < 3:
        assert owner.export.wakeups()[0].poll(PATIENCE_MS)
        owner.export.poll()
    assert owner.export.dropped == {"epoch": 2, "unknown": 1}
    assert unchanged(owner, before)
    assert owner.settle(grant, fill(link, grant, reference(1))) is Arrival.READY
    link.close()


@pytest.mark.parametrize(
    ("reason", "piece", "size"),
    [
        ("gap", Piece("epoch-1", 1, 0, 1, 0, (1,)), 512),
        ("layer", Piece("epoch-1", 1, 0, 0, 3, (1,)), 512),
        ("blocks", Piece("epoch-1", 1, 0, 0, 0, (3,)), 512),
        ("blocks", Piece("epoch-1", 1, 0, 0, 0, (1, 1)), 1024),
        ("size", Piece("epoch-1", 1, 0, 0, 0, (1,)), 511),
        ("size", Piece("epoch-1", 1, 0, 0, 0, (1,)), 513),
        ("size", Piece("epoch-1", 1, 0, 0, 0, (1,)), 0),
        ("digest", End("epoch-1", 1, 0, 1, 0, 0, bytes(16), ()), None),
    ],
)
def test_what_does_not_fit_spoils_the_fill(
    owner: Owner, reason: str, piece: Piece | End, size: int | None
) -> None:
    link, grant = frames_link(owner), owner.grant(1, 2)
    before = snapshot(owner)
    link._send([piece.encode()] if size is None else [piece.encode(), bytes(size)])
    receipt = fill(link, grant, reference(1))
    assert owner.settle(grant, receipt) is (Arrival.LOST if reason == "gap" else Arrival.BAD)
    owner.export.poll()
    assert owner.export.dropped[reason] == 1
    assert owner.export.dropped["repeated"] == 0
    assert unchanged(owner, before)
    link.close()


def test_frames_larger_than_any_of_ours_never_reach_the_owner(owner: Owner) -> None:
    link = frames_link(owner)
    link._send(
        [Probe(last=False).encode(), bytes((1 << 20) + 1)]
    )  # costs the sender its connection
    again = frames_link(owner)
    owner.drain(again, 1)
    assert not owner.export.dropped
    link.close()
    again.close()


def test_a_fill_that_stops_coming_turns_bad(folder: Path) -> None:
    now = 0.0
    slabs = allocate_slabs(LAYOUT, 24, "cpu", shared=False)
    export = FramesExport(slabs, base.Owner("epoch-1", folder), patience_s=5.0, clock=lambda: now)
    owner = Owner(slabs, export)
    good, bad = frames_link(owner), FaultyLink(frames_link(owner), Fault.DROP_END)
    grant = owner.grant(1, 2)
    receipt = fill(bad, grant, reference(1))
    owner.drain(good, 9)
    lanes = export._incoming[grant.generation].lanes
    while not lanes or lanes[0].expected < 6:  # another connection's frames may come later
        assert export.wakeups()[0].poll(PATIENCE_MS)
        export.poll()
    assert export.arrival(grant, receipt) is Arrival.PENDING
    now = 5.1
    assert export.arrival(grant, receipt) is Arrival.LOST
    assert export.dropped == {"lost": 1}
    good.close()
    bad.close()
    owner.close()


def test_a_push_to_an_owner_that_does_not_read_gives_up(folder: Path) -> None:
    layout = KVLayout((LayerShape(8, 64, 64),), 16, "float32")  # 64 KiB a block
    slabs = allocate_slabs(layout, 2, "cpu", shared=False)
    export = FramesExport(slabs, base.Owner("epoch-1", folder))
    link = FramesLink(export.region, layout, Writer(CPU))
    link._lanes._deadline_s = 0.1  # from now on: connecting may take longer
    grant = Grant("d0", "epoch-1", "r1#0", 1, (0,))
    export.expect(grant)
    started = time.monotonic()
    pushed = 0
    with pytest.raises(TransferError, match="received nothing"):  # noqa: PT012
        while True:
            link.push(grant, 0, slabs.tensors[0], [0], [0])
            pushed += 1
            assert pushed < 100, "the queue is not bounded"
    assert time.monotonic() - started >= 0.1
    with pytest.raises(TransferError, match="was not sent"):
        link.finish(grant, [0])
    link.abandon(grant)
    link.close()
    export.close()


def test_one_poll_takes_a_bounded_share(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "POLL_MESSAGES", 2)
    link, grant = frames_link(owner), owner.grant(1, 2, 3)
    receipt = fill(link, grant, reference(1))  # seven messages
    assert owner.settle(grant, receipt) is Arrival.READY
    link.close()


def test_a_probe_is_answered(owner: Owner) -> None:
    import threading

    link, done = frames_link(owner), threading.Event()

    def serve() -> None:
        while not done.is_set():
            owner.export.wakeups()[0].poll(50)
            owner.export.poll()

    server = threading.Thread(target=serve)
    server.start()
    assert link.probe() > 0
    done.set()
    server.join()
    assert not owner.export.dropped
    link.close()


def test_strangers_do_not_get_in(folder: Path) -> None:
    owner = make_owner("frames_tcp", folder)
    public, secret = zmq.curve_keypair()
    stranger = CurveKeys(public, secret, frozenset([KEYS.public]))
    with pytest.raises(TransferError, match="frames to tcp"):
        FramesLink(owner.export.region, LAYOUT, Writer(CPU, stranger, deadline_s=0.5))
    with pytest.raises(TransferError, match="must be trusted"):
        FramesLink(owner.export.region, LAYOUT, Writer(CPU, CurveKeys(public, secret)))
    with pytest.raises(TransferError, match="needs CURVE keys"):
        FramesLink(owner.export.region, LAYOUT, Writer(CPU))
    assert "secret" not in repr(stranger)
    owner.close()


# ---- junk

parts = st.lists(st.binary(max_size=200), min_size=1, max_size=5)
scalars = st.none() | st.booleans() | st.integers(-9, 2**40) | st.text(max_size=5) | st.binary()
headers = st.lists(
    st.sampled_from([1, "kv", "end", "probe", "epoch-1"]) | scalars | st.lists(scalars, max_size=3),
    max_size=8,
).map(lambda fields: [msgpack.packb(fields), b"payload"])


@pytest.fixture(scope="module")
def junkyard() -> Iterator[tuple[Owner, zmq.Socket[bytes]]]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="baton-") as name:
        owner = make_owner("frames", Path(name))
        owner.grant(1, 2)
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(owner.export.region.address["endpoints"][0].decode())
        yield owner, socket
        socket.close(0)
        context.term()
        owner.close()


@given(messages=st.lists(parts | headers, min_size=1, max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_junk_is_counted_and_nothing_else(
    junkyard: tuple[Owner, zmq.Socket[bytes]], messages: list[list[bytes]]
) -> None:
    owner, socket = junkyard
    before, counted = snapshot(owner), sum(owner.export.dropped.values())
    for message in messages:
        socket.send_multipart(message)
    while sum(owner.export.dropped.values()) < counted + len(messages):
        assert owner.export.wakeups()[0].poll(PATIENCE_MS)
        owner.export.poll()
    assert unchanged(owner, before)


@given(st.binary(max_size=300) | headers.map(lambda parts: parts[0]))
def test_decode_never_raises(header: bytes) -> None:
    decode(header)


@given(
    st.text(max_size=20),
    st.integers(0, 2**60),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50).map(tuple),
    st.binary(max_size=32),
)
def test_headers_survive_the_wire(
    epoch: str, number: int, blocks: tuple[int, ...], digest: bytes
) -> None:
    piece = Piece(epoch, number, 2, number, 3, blocks)
    end = End(epoch, number, 2, 4, 7, number, digest, blocks)
    assert decode(piece.encode()) == piece
    assert decode(end.encode()) == end
    assert decode(Probe(last=True).encode()) == Probe(last=True)


def test_a_whole_fill_with_a_frame_for_each_block(folder: Path) -> None:
    """Blocks that do not fit into a frame of 1 MiB travel alone."""
    layout = KVLayout((LayerShape(16, 512, 512),), 32, "float32")  # 2 MiB a block
    slabs = allocate_slabs(layout, 3, "cpu", shared=False)
    source = allocate_slabs(layout, 3, "cpu", shared=False).tensors[0].random_(0, 256)
    export = FramesExport(slabs, base.Owner("epoch-1", folder))
    link = FramesLink(export.region, layout, Writer(CPU))
    owner, grant = Owner(slabs, export), Grant("d0", "epoch-1", "r1#0", 1, (0, 1, 2))
    export.expect(grant)
    write(link, grant, 0, source, grant.blocks)
    assert owner.settle(grant, link.finish(grant, grant.blocks)) is Arrival.READY
    assert slabs.tensors[0].equal(source)
    link.close()
    owner.close()


def test_sockets_of_killed_owners_are_removed_and_no_others(folder: Path) -> None:
    paths = {name: folder / f"kv-{name}.sock" for name in ("dead", "alive", "young")}
    for path in paths.values():
        with socket.socket(socket.AF_UNIX) as abandoned:
            abandoned.bind(str(path))
        os.utime(path, (time.time() - 60,) * 2)
    os.utime(paths["young"])
    other = folder / "other.sock"
    other.touch()
    os.utime(other, (0, 0))
    with socket.socket(socket.AF_UNIX) as listening:
        paths["alive"].unlink()
        listening.bind(str(paths["alive"]))
        listening.listen()
        os.utime(paths["alive"], (0, 0))
        owner = make_owner("frames", folder)
    left = {path.name for path in folder.iterdir()}
    assert left >= {"kv-alive.sock", "kv-young.sock", "other.sock"}
    assert "kv-dead.sock" not in left
    assert len(left) == 4, "and the new owner's own"
    owner.close()
