"""Keys that do not fit are said on both sides, again and again, with the option to use."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.wire import messages as msg
from baton.wire.channel import Dialer, Listener
from baton.wire.handshakes import IDLE_S, SAY_AGAIN_S
from baton.wire.keys import ClusterKeys, load_keys, make_keys
from baton.wire.node import ROUTER
from tests.patience import PATIENCE_MS, patiently

WORKER, ROUTERS = "and this process have different keys: start this one with --keys", "turned away"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="bt-"))
    for name in ("ours", "others"):
        make_keys(made / name)
    yield made
    shutil.rmtree(made)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("wrong", ["member", "router", "both"])
def test_both_sides_say_that_keys_do_not_fit(
    folder: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, others = load_keys(folder / "ours", router=True), load_keys(folder / "others")
    member = others if wrong != "router" else ours
    keys = ClusterKeys(
        ours.router_public if wrong == "member" else others.router_public,
        member.member_public,
        member.member_secret,
    )
    clock = Clock()
    router = Listener("tcp://127.0.0.1:*", ours, clock=clock)
    worker = Dialer("w", router.address, keys, clock=clock)

    def lines(text: str) -> list[str]:
        return [r.getMessage() for r in caplog.records if text in r.getMessage()]

    def look(times: int) -> None:
        for _ in patiently(lambda: caplog.text):
            worker._handshakes._monitor.poll(20)
            list(worker.receive())
            list(router.receive())
            if len(lines(WORKER)) >= times and len(lines(ROUTERS)) >= times:
                return
            clock.now += IDLE_S / 10  # so it connects again although its key was refused

    try:
        look(1)
        assert router.address in lines(WORKER)[0]
        assert "without router.secret" in lines(WORKER)[0]
        assert "without router.secret" in lines(ROUTERS)[0]
        assert len(lines(WORKER)) == len(lines(ROUTERS)) == 1
        clock.now += SAY_AGAIN_S
        look(2)
    finally:
        worker.close()
        router.close()


def test_right_keys_are_not_talked_about(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = load_keys(folder / "ours", router=True)
    router = Listener("tcp://127.0.0.1:*", keys)
    worker = Dialer("w", router.address, keys)
    try:
        assert worker.socket.poll(PATIENCE_MS, 2)
        assert worker.send(ROUTER, msg.Drop("a#0"))
        assert router.socket.poll(PATIENCE_MS)
        assert list(router.receive())
        list(worker.receive())
        assert caplog.text == ""
    finally:
        worker.close()
        router.close()
