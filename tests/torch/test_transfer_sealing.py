"""Sealing: who gets in, and what a stranger on the wire can do to frames between hosts: cut them."""

from collections.abc import Callable
from contextlib import suppress

import msgpack
import pytest
import torch
import zmq

from baton.errors import TransferError
from baton.kv.region import Arrival
from baton.transfer.base import Writer
from baton.transfer.curve import login_client
from baton.transfer.frame_codec import MOST_RUNS, Piece, Probe
from baton.transfer.frames_link import FramesLink
from baton.transfer.gate import (
    ask_for_tickets,
    decode_answer,
    decode_question,
    encode_answer,
    encode_question,
)
from baton.transfer.lanes import Parts
from baton.transfer.packing import Places, block_places, pack
from baton.transfer.pieces import rows
from baton.transfer.sealing import MAX_TICKETS, SEAL_BYTES, Seal, Seals, Ticket, Tickets
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.torch.owners import (
    BLOCKS,
    KEYS,
    LAYOUT,
    Owner,
    fill,
    holds,
    reference,
    snapshot,
    unchanged,
)

TRANSPORT = "frames_tcp"
CPU = torch.device("cpu")


# ---- tickets


def test_a_ticket_lets_in_once_and_only_with_its_secret() -> None:
    tickets = Tickets()
    first, second = tickets.issue(2)
    assert not tickets.admit(first.name, second.secret)
    assert not tickets.admit(b"nobody", first.secret)
    assert tickets.seals(first.name) is None  # not let in yet
    assert tickets.admit(first.name, first.secret)
    assert not tickets.admit(first.name, first.secret)
    theirs, ours = tickets.seals(first.name), Seals.of_writer(first)
    assert theirs is not None
    assert theirs.receives.open(ours.sends.close(b"to you", 1), 1) == b"to you"
    assert ours.receives.open(theirs.sends.close(b"to me", 1), 1) == b"to me"
    assert tickets.seals(first.name) is None  # for one connection
    assert len({getattr(t, part) for t in (first, second) for part in Ticket.__slots__}) == 8
    assert first.secret.decode() not in repr(first)


def test_tickets_that_nobody_uses_are_bounded() -> None:
    tickets = Tickets()
    (old,) = tickets.issue(1)
    (new, *_) = tickets.issue(MAX_TICKETS)
    assert not tickets.admit(old.name, old.secret)
    assert tickets.admit(new.name, new.secret)


@pytest.mark.parametrize(
    "message",
    [b"", b"\xc1", bytes(5000), *map(msgpack.packb, ([], [2, "lanes", 1], [1, "lanes", 0],
     [1, "lanes", 17], [1, "lanes", True], [1, "tickets", [[b"a", b"b", b"c", b"d"]]],
     [1, "tickets", [["a", "b"]]], [1, "tickets", 3]))],
)  # fmt: skip
def test_junk_at_the_gate_is_nothing(message: bytes) -> None:
    assert decode_question(message) is None
    assert decode_answer(message) is None


def test_questions_and_answers_survive_the_wire() -> None:
    tickets = Tickets().issue(16)
    assert decode_answer(encode_answer(tickets)) == tickets
    assert decode_question(encode_question(16)) == 16


# ---- seals


def flipped(part: bytes) -> bytes:
    return bytes([part[0] ^ 1]) + part[1:]


def test_headers_open_in_order_and_not_otherwise() -> None:
    sends, receives = Seal(b"k" * 32), Seal(b"k" * 32)
    first, second, third = (sends.close(b"%d" % n, 2) for n in range(3))
    assert receives.open(second, 2) is None  # one is missing
    assert receives.open(flipped(first), 2) is None
    assert receives.open(first, 1) is None  # its payload was cut off
    assert receives.open(first[:-1], 2) is None
    assert receives.open(b"", 2) is None
    assert receives.open(first, 2) == b"0"
    assert receives.open(first, 2) is None  # again
    assert Seal(b"l" * 32).open(first, 2) is None
    assert receives.open(second, 2) == b"1"
    assert receives.open(third, 2) == b"2"


def test_a_payload_opens_under_its_number_and_as_it_was() -> None:
    sends, receives = Seal(b"k" * 32), Seal(b"k" * 32)
    out, pieces = memoryview(bytearray(7 + 2 * SEAL_BYTES)), [b"keys", b"val"]
    assert sends.close_into([b"other"], memoryview(bytearray(5 + SEAL_BYTES))) == 0
    assert sends.close_into(pieces, out) == 1
    found = [memoryview(bytearray(4)), memoryview(bytearray(3))]
    assert receives.open_into(1, out, found)
    assert [bytes(each) for each in found] == pieces
    assert receives.open_into(1, out, found)  # in any order, any number of times: headers count
    assert not receives.open_into(0, out, found)
    assert not receives.open_into(1, out, found[::-1])
    for place in range(len(out)):
        out[place] ^= 1
        assert not receives.open_into(1, out, found)
        out[place] ^= 1


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([3, 4, 5], [7, 8, 9]),  # one run
        ([3, 5, 4], [7, 8, 9]),
        ([3, 4, 5], [9, 8, 7]),
        ([1], [23]),
        (list(range(24)), [*range(0, 24, 2), *range(1, 24, 2)]),  # more runs than a frame has
    ],
)
@pytest.mark.parametrize("run_bytes", [1, 1 << 20])
def test_what_is_packed_lies_where_it_belongs(
    source: list[int], target: list[int], run_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.transfer.packing.RUN_BYTES", run_bytes)
    sends, receives, room = Seal(b"k" * 32), Seal(b"k" * 32), bytearray(1 << 20)
    pool = [torch.zeros_like(slab) for slab in reference(2)]
    for layer, slab in enumerate(reference(1)):
        packed = pack(LAYOUT, layer, slab, source, target, sends)
        assert 0 < len(packed.runs) <= MOST_RUNS
        assert len(packed.payload) == packed.size + 2 * SEAL_BYTES * len(packed.runs)
        piece = Piece("e", 1, 0, 0, layer, tuple(target), packed.seal, packed.runs)
        places = Places(LAYOUT, piece, pool[layer], room)
        assert receives.open_into(packed.seal, packed.payload.numpy().data, places.pieces)
        assert places.crc == packed.crc
        places.settle(rows(LAYOUT, layer, pool[layer]))
        there, wanted = rows(LAYOUT, layer, pool[layer]), rows(LAYOUT, layer, slab)
        assert there.keys[target].equal(wanted.keys[source])
        assert there.values[target].equal(wanted.values[source])
        others = [block for block in range(BLOCKS) if block not in target]
        assert not there.keys[others].any()
        assert not there.values[others].any()
        whole = block_places(slab.numpy().data, LAYOUT, layer, 0, BLOCKS)
        assert sum(map(len, whole)) == len(slab)


# ---- on the wire


def tcp_link(owner: Owner) -> FramesLink:
    return FramesLink(owner.export.region, LAYOUT, Writer(CPU, KEYS))


def until(owner: Owner, over: Callable[[], bool]) -> None:
    while not over():
        assert owner.export.wakeups()[0].poll(PATIENCE_MS)
        owner.export.poll()


def on_the_wire(link: FramesLink, change: Callable[[list[bytes]], list[list[bytes]]]) -> None:
    """What a lane sends is replaced by these messages, sealed as it is."""
    for lane in link._lanes._lanes:
        through = lane.socket.send_multipart

        def send(
            parts: Parts, flags: int, copy: bool, through: Callable[..., object] = through
        ) -> None:
            for changed in change([bytes(part) for part in parts]):
                through(changed, flags, copy=copy)

        lane.socket.__dict__["send_multipart"] = send


CHANGES: dict[str, Callable[[list[bytes]], list[list[bytes]]]] = {
    "a header is changed": lambda parts: [[flipped(parts[0]), *parts[1:]]],
    "a payload is cut off": lambda parts: [parts[:1]],
    "a part is added": lambda parts: [[*parts, b"more"]],
    "it comes twice": lambda parts: [parts, parts],
    "something comes between": lambda parts: [[Probe(last=True).encode(), b"x"], parts],
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_stranger_on_the_wire_changes_nothing(owner: Owner, what: str) -> None:
    link, grant, before = tcp_link(owner), owner.grant(1, 2), snapshot(owner)
    on_the_wire(link, CHANGES[what])
    receipt = fill(link, grant, reference(1))
    harmless = what in ("it comes twice", "something comes between")
    if harmless:
        assert owner.settle(grant, receipt) is Arrival.READY
        assert holds(owner, reference(1), [1, 2])
    else:
        until(owner, lambda: owner.export.dropped.total() >= 6)
        assert unchanged(owner, before)
        assert owner.export.arrival(grant, receipt) is Arrival.PENDING
    assert set(owner.export.dropped) == {"forged"}
    link.close()


def test_a_payload_that_does_not_open_spoils_its_fill_and_no_other(owner: Owner) -> None:
    link, grant = tcp_link(owner), owner.grant(1, 2)
    on_the_wire(link, lambda parts: [[parts[0], *map(flipped, parts[1:])]])
    receipt = fill(link, grant, reference(1))
    assert owner.settle(grant, receipt) is Arrival.BAD
    assert owner.export.dropped["seal"] >= 1
    other = tcp_link(owner)
    owner.drain(other, 9)
    link.close()
    other.close()


def test_an_ack_that_is_forged_is_no_ack(owner: Owner) -> None:
    link, grant = tcp_link(owner), owner.grant(1, 2)
    fill(link, grant, reference(1))
    seals = [lane.seals for lane in link._lanes._lanes]
    for lane, theirs in zip(link._lanes._lanes, [*seals[1:], seals[0]], strict=True):
        lane.seals = theirs  # what comes is not what this lane's owner sealed
    until(owner, lambda: owner.export._incoming[grant.generation].done)
    owner.export.poll()
    for lane in link._lanes._lanes:
        assert lane.socket.poll(PATIENCE_MS)
    link.tend()
    assert link.owed
    link.close()


def test_without_a_ticket_nobody_gets_a_message_in(owner: Owner) -> None:
    address = owner.export.region.address
    gate, endpoint = (address["gate"].decode(), address["endpoints"][0].decode())
    (ticket,) = ask_for_tickets(gate, 1, KEYS, KEYS.public, PATIENCE_S)
    context = zmq.Context()
    for name, secret in [(b"", b""), (ticket.name, b"guessed"), (b"x" * 32, ticket.secret)]:
        stranger = context.socket(zmq.DEALER)
        if name:
            login_client(stranger, name, secret)
        events = stranger.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_DISCONNECTED
        )
        stranger.connect(endpoint)
        with suppress(zmq.Again):  # it may be refused already
            stranger.send(b"let me in", zmq.NOBLOCK)
        assert events.poll(PATIENCE_MS), "it was not refused"
        stranger.disable_monitor()
        events.close(0)
        stranger.close(0)
    context.term()
    link = tcp_link(owner)
    owner.drain(link, 9)
    assert not owner.export.dropped
    link.close()


def test_an_owner_that_is_busy_still_opens_the_gate_and_one_that_is_gone_does_not(
    owner: Owner,
) -> None:
    tcp_link(owner).close()  # nobody polls the export meanwhile
    region = owner.export.region
    owner.export.close()
    with pytest.raises(TransferError, match="frames to tcp"):
        FramesLink(region, LAYOUT, Writer(CPU, KEYS, deadline_s=0.5))
