"""Real sockets: what gets through, what is dropped, who is not let in."""

import contextlib
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from baton.errors import InputError
from baton.package import ROOT
from baton.params import GenerationParams
from baton.wire import channel as channels
from baton.wire import messages as msg
from baton.wire.channel import Dialer, Listener, check_address
from baton.wire.codec import encode
from baton.wire.handshakes import IDLE_S
from baton.wire.keys import ClusterKeys, load_keys, make_keys
from baton.wire.node import ROUTER
from baton.wire.rare_line import RareLine
from tests.patience import PATIENCE_MS, PATIENCE_S, patiently
from tools.faults.proxy import Faults, Proxy

SILENCE_MS = 150


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path of mode 0700: a socket's path has room for about 100 characters."""
    made = Path(tempfile.mkdtemp(prefix="bt-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def keys(folder: Path) -> ClusterKeys:
    make_keys(folder / "keys")
    return load_keys(folder / "keys", router=True)


@contextlib.contextmanager
def closing(*channels: Listener | Dialer) -> Iterator[None]:
    try:
        yield
    finally:
        for channel in channels:
            channel.close()


def received(channel: Listener | Dialer, count: int = 1) -> list[tuple[str, msg.Message]]:
    """So many messages, as soon as they are there."""
    got: list[tuple[str, msg.Message]] = []
    while len(got) < count and channel.socket.poll(PATIENCE_MS):
        got += flat(channel)
    return got


def flat(channel: Listener | Dialer) -> list[tuple[str, msg.Message]]:
    return [(sender, message) for sender, messages in channel.receive() for message in messages]


def sends(channel: Listener | Dialer, peer: str, *messages: msg.Message) -> bool:
    """Send as soon as the peer is connected."""
    for _ in patiently(f"a way to {peer or 'the router'}"):
        if channel.send(peer, *messages):
            break
        channel.socket.poll(25, zmq.POLLOUT)
    return True


def test_one_message_to_many_peers_is_packed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[msg.Message] = []

    def counted(message: msg.Message) -> bytes:
        packed.append(message)
        return encode(message)

    address = f"ipc://{folder / 'router.sock'}"
    router = Listener(address)
    peers = [Dialer(f"p{index}", address) for index in range(3)]
    with closing(router, *peers):
        for peer in peers:
            assert sends(peer, ROUTER, msg.GetClusterInfo())
        assert len(received(router, 3)) == 3
        monkeypatch.setattr("baton.wire.channel.encode", counted)
        beats = [msg.Heartbeat("router/1", steps) for steps in (1, 2)]
        for beat in beats:
            for index in range(3):
                assert router.send(f"p{index}", beat, msg.Welcome("router/1", "here", index + 1))
        assert [each for each in packed if isinstance(each, msg.Heartbeat)] == beats
        for index, peer in enumerate(peers):
            welcome = msg.Welcome("router/1", "here", index + 1)
            expected = [m for beat in beats for m in (beat, welcome)]
            assert [message for _, message in received(peer, 4)] == expected


def junk(address: str, frames: list[bytes], identity: bytes = b"worker") -> Callable[[], None]:
    """A peer that speaks ZeroMQ and nothing else."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.identity = identity
    dealer.linger = 1000
    dealer.connect(address)
    dealer.send_multipart(frames)

    def stop() -> None:
        dealer.close()
        context.term()

    return stop


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_messages_go_there_and_back_by_ipc(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/r.sock")
    worker = Dialer("w", f"ipc://{folder}/r.sock")
    with closing(router, worker):
        assert sends(worker, ROUTER, msg.Drop("a#0"))
        assert received(router) == [("w", msg.Drop("a#0"))]
        assert router.send("w", msg.Heartbeat("e", 1))
        assert received(worker) == [(ROUTER, msg.Heartbeat("e", 1))]


def test_messages_go_there_and_back_by_tcp_with_keys(keys: ClusterKeys) -> None:
    router = Listener("tcp://127.0.0.1:*", keys)
    worker = Dialer("w", router.address, keys)
    with closing(router, worker):
        assert sends(worker, ROUTER, msg.Drop("a#0"))
        assert received(router) == [("w", msg.Drop("a#0"))]


@pytest.mark.parametrize("by", ["router", "worker"])
def test_a_damaged_message_does_not_end_the_link_for_good(
    keys: ClusterKeys, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly = 100 if by == "router" else 600_000  # the worker knows at once, not by a heartbeat
    monkeypatch.setattr(channels, "HEARTBEAT_MS", quickly)
    monkeypatch.setattr(channels, "SILENT_MS", 10 * quickly)
    now = [0.0]
    router = Listener("tcp://127.0.0.1:*", keys)
    with Proxy(int(router.address.rpartition(":")[2])) as proxy:
        worker = Dialer("w", f"tcp://127.0.0.1:{proxy.port}", keys, clock=lambda: now[0])
        with closing(router, worker):
            assert sends(worker, ROUTER, msg.Drop("a#0"))
            assert received(router) == [("w", msg.Drop("a#0"))]
            proxy.faults = Faults(flip=1.0)
            lost: list[msg.Message] = []
            for _ in patiently("the end of the connection"):
                if msg.Unreachable(ROUTER) in lost:
                    break
                if by == "router":
                    router.send("w", msg.Heartbeat("e", 1))
                else:
                    worker.send(ROUTER, msg.Heartbeat("e", 1))
                worker.socket.poll(20)
                lost += [message for _, message in flat(worker)]
            assert proxy.flipped
            assert msg.Unreachable(ROUTER) in lost
            proxy.faults = Faults()
            arrived: list[tuple[str, msg.Message]] = []
            for _ in patiently("what is sent at last"):
                worker.send(
                    ROUTER, msg.Drop("b#0")
                )  # the old connection may still take it, and lose it
                router.socket.poll(20)
                arrived += flat(router)
                if ("w", msg.Drop("b#0")) in arrived:
                    break
                now[0] += IDLE_S / 4
                flat(worker)
            assert ("w", msg.Drop("b#0")) in arrived


def test_messages_of_one_peer_arrive_in_order_and_all(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/r.sock")
    worker = Dialer("w", router.address)
    with closing(router, worker):
        assert sends(worker, ROUTER, msg.Heartbeat("e", 0))
        for step in range(1, 500):
            assert worker.send(ROUTER, msg.Heartbeat("e", step))
        assert [m.steps for _, m in received(router, 500) if isinstance(m, msg.Heartbeat)] == [
            *range(500)
        ]


def test_what_is_sent_together_arrives_together(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/r.sock")
    worker = Dialer("w", router.address)
    several = [msg.Drop(f"a#{i}") for i in range(50)]
    with closing(router, worker):
        assert sends(worker, ROUTER, *several)
        assert router.socket.poll(PATIENCE_MS)
        assert next(router.receive()) == ("w", several)
        assert router.send("w", *several)
        assert worker.socket.poll(PATIENCE_MS)
        assert list(worker.receive()) == [(ROUTER, several)]


@pytest.mark.parametrize("wrong", ["member", "router", "none"])
def test_without_the_right_keys_nothing_gets_through(
    folder: Path, keys: ClusterKeys, wrong: str
) -> None:
    make_keys(folder / "others")
    others = load_keys(folder / "others")
    bad = {
        "member": ClusterKeys(keys.router_public, others.member_public, others.member_secret),
        "router": ClusterKeys(others.router_public, keys.member_public, keys.member_secret),
    }
    router = Listener("tcp://127.0.0.1:*", keys)
    good = Dialer("good", router.address, keys)
    stop: Callable[[], None]
    if wrong == "none":
        stop = junk(router.address, [encode(msg.Drop("bad#0"))])
    else:
        intruder = Dialer("bad", router.address, bad[wrong])
        stop = intruder.close
        intruder.socket.poll(SILENCE_MS, zmq.POLLOUT)
        intruder.send(ROUTER, msg.Drop("bad#0"))
    try:
        with closing(router, good):
            assert sends(good, ROUTER, msg.Drop("good#0"))
            assert received(router) == [("good", msg.Drop("good#0"))]
            assert not router.socket.poll(SILENCE_MS)
    finally:
        stop()


def test_what_is_no_message_is_dropped_counted_and_logged_once_a_second(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    router = Listener(f"ipc://{folder}/r.sock", clock=lambda: now[0])
    hostile = [
        [b"\x80\x04junk"],
        [b""],
        [b"a", b"b"],
        [b"\x92\xa4Drop\x01"],
        [b"", b"\x91\xa7Inquire"],
    ]
    worker = Dialer("w", router.address)
    with closing(router, worker), caplog.at_level(logging.WARNING):
        for second in range(2):
            now[0] = float(second)
            stops = [
                junk(router.address, each, b"j%d.%d" % (second, i))
                for i, each in enumerate(hostile)
            ]
            for stop in stops:
                stop()
            while router.malformed < len(hostile) * (second + 1) and router.socket.poll(
                PATIENCE_MS
            ):
                assert flat(router) == []
        assert sends(worker, ROUTER, msg.Drop("a#0"))
        assert received(router) == [("w", msg.Drop("a#0"))]
    assert router.malformed == 2 * len(hostile)
    first, second_line = [record.getMessage() for record in caplog.records]
    assert "dropped a malformed message" in first
    assert second_line.endswith("(4 more since the last such line)")


def test_a_storm_of_noise_is_one_line_a_second_whatever_its_size() -> None:
    line = RareLine()
    written = [line.more(index / 1000) for index in range(10_000)]
    assert line.total == 10_000
    assert [each for each in written if each is not None] == [
        "", *[" (999 more since the last such line)"] * 9
    ]  # fmt: skip


def test_a_malformed_submit_reaches_the_router_as_such_beside_sound_ones(folder: Path) -> None:
    sound = msg.Submit("r2", "once", GenerationParams(1))
    broken = msgpack.packb(["Submit", "r1", "once"])
    router = Listener(f"ipc://{folder}/r.sock")
    stop = junk(router.address, [broken, encode(sound)], b"client")
    try:
        with closing(router):
            found = received(router, 2)
    finally:
        stop()
    assert [sender for sender, _ in found] == ["client", "client"]
    why = "Submit has 10 fields, got 2"
    assert [message for _, message in found] == [msg.Malformed("Submit", "r1", why), sound]


def test_a_peer_that_is_not_there_is_reported_at_once(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/r.sock")
    worker = Dialer("w", f"ipc://{folder}/nobody.sock")
    with closing(router, worker):
        assert not router.send("nobody", msg.Drop("a#0"))
        assert not worker.send(ROUTER, msg.Drop("a#0"))


def test_a_peer_that_has_left_is_reported(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/r.sock")
    worker = Dialer("w", router.address)
    with closing(router):
        with closing(worker):
            assert sends(worker, ROUTER, msg.Drop("a#0"))
            assert received(router)
        for _ in patiently("the router notices"):
            if not router.send("w", msg.Drop("a#0")):
                break
            router.socket.poll(10)


def test_nothing_is_kept_for_a_router_that_is_to_come(folder: Path) -> None:
    worker = Dialer("w", f"ipc://{folder}/r.sock")
    with closing(worker):
        assert not worker.send(ROUTER, msg.Drop("old#0"))
        router = Listener(f"ipc://{folder}/r.sock")
        with closing(router):
            assert sends(worker, ROUTER, msg.Drop("new#0"))
            assert received(router) == [("w", msg.Drop("new#0"))]


def test_the_exit_of_a_peer_is_told_by_the_loop_not_by_another_peer(folder: Path) -> None:
    """Exited travels in no frame: whoever could send it could have any worker declared dead."""
    router = Listener(f"ipc://{folder}/r.sock")
    worker = Dialer("w", router.address)
    with closing(router, worker):
        assert sends(worker, ROUTER, msg.Exited("decode-0"))
        assert sends(worker, ROUTER, msg.Drop("a#0"))
        assert received(router) == [("w", msg.Drop("a#0"))]


# ---- addresses


@pytest.mark.parametrize(
    "address", ["", "x", "ipc://", "tcp://", "udp://a:1", "inproc://a", "/tmp/x"]
)
def test_only_ipc_and_tcp_are_spoken(address: str) -> None:
    with pytest.raises(InputError, match=r"must be ipc://PATH or tcp://HOST:PORT"):
        check_address(address, None)


def test_tcp_needs_keys(keys: ClusterKeys) -> None:
    with pytest.raises(InputError, match="needs keys"):
        check_address("tcp://127.0.0.1:7000", None)
    check_address("tcp://127.0.0.1:7000", keys)
    check_address("ipc:///tmp/x", None)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "[::]"])
def test_the_whole_world_is_not_listened_to(host: str, keys: ClusterKeys) -> None:
    with pytest.raises(InputError, match="every interface"):
        Listener(f"tcp://{host}:{free_port()}", keys)


@pytest.mark.parametrize("host", ["[::0]", "[0:0:0:0:0:0:0:0]"])
def test_the_whole_world_in_other_words_is_not_listened_to(host: str, keys: ClusterKeys) -> None:
    from baton.wire.channel import _check_bind

    with pytest.raises(InputError, match="every interface"):
        _check_bind(f"tcp://{host}:7000")


def test_a_folder_others_can_enter_is_refused(folder: Path) -> None:
    open_folder = folder / "open"
    open_folder.mkdir()
    open_folder.chmod(0o755)
    with pytest.raises(InputError, match=r"open to other users \(mode 0755\)"):
        Listener(f"ipc://{open_folder}/r.sock")


def test_a_folder_that_is_not_there_is_made_for_us_alone(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/new/r.sock")
    with closing(router):
        assert (folder / "new").stat().st_mode & 0o777 == 0o700


def test_a_path_too_long_for_a_socket_is_refused_by_length(folder: Path) -> None:
    with pytest.raises(InputError, match="allows about 100"):
        Listener(f"ipc://{folder}/{'x' * 100}")


def test_a_port_that_is_taken_is_refused_in_words(keys: ClusterKeys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot listen on {address}: Address already in use"):
            Listener(address, keys)


def test_an_ipc_socket_in_use_is_refused(folder: Path) -> None:
    router = Listener(f"ipc://{folder}/r.sock")
    with closing(router), pytest.raises(InputError, match="cannot listen"):
        Listener(f"ipc://{folder}/r.sock").close()


TAKEOVER = """
import sys
from pathlib import Path
from baton.wire import channel
from baton.wire.keys import load_keys
from baton.wire.messages import Drop
from tests.pure.test_channel import received, sends
channel.HEARTBEAT_MS, channel.SILENT_MS = 20, 600_000
keys = load_keys(Path(sys.argv[1]), router=True)
router = channel.Listener("tcp://127.0.0.1:*", keys)
peers = []
for run in ("a", "b"):
    peers.append(channel.Dialer("w", router.address, keys))
    assert sends(peers[-1], "router", Drop(run))
    assert received(router) == [("w", Drop(run))]
first, second = peers
for _ in range(20):
    first.send("router", Drop("c"))
router.socket.poll(100)
first.close()
router.socket.poll(500)
assert sends(second, "router", Drop("d"))
print(received(router)[-1][1].run)
"""


def test_a_name_that_another_peer_has_taken_ends_no_router(keys: ClusterKeys, folder: Path) -> None:
    """libzmq aborts if a listening end has heartbeats: in the first one after the old peer has closed."""
    done = subprocess.run(
        [sys.executable, "-c", TAKEOVER, folder / "keys"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "d\n"), done.stderr[-2000:]


def test_a_half_open_connection_is_ended_on_both_sides(
    keys: ClusterKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing passes, and nothing is closed: the other host is gone, or a firewall has forgotten it."""
    monkeypatch.setattr(channels, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(channels, "SILENT_MS", 1000)
    router = Listener("tcp://127.0.0.1:*", keys)
    with Proxy(int(router.address.rpartition(":")[2])) as proxy:
        worker = Dialer("w", f"tcp://127.0.0.1:{proxy.port}", keys)
        with closing(router, worker):
            assert sends(worker, ROUTER, msg.Drop("a#0"))
            assert received(router) == [("w", msg.Drop("a#0"))]
            worker.socket.poll(200)  # some heartbeats pass
            proxy.faults = Faults(silent=True)
            for _ in patiently("the end at the worker"):
                worker.socket.poll(20)
                if (ROUTER, msg.Unreachable(ROUTER)) in flat(worker):
                    break
            for _ in patiently("the end at the router"):
                if not router.send("w", msg.Heartbeat("e", 1)):
                    break
                router.socket.poll(20)
