"""What the loop notices of processes: those it watches, and its parent."""

import os
from collections.abc import Iterator

import pytest
import zmq

from baton.wire import messages as msg
from baton.wire.loop import Loop, Watcher
from baton.wire.node import Stop, Watch
from tests.pure.looping import PretendChannel, Recorder, child, close_pretend_channels, zombie


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    yield
    close_pretend_channels()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd (Linux 5.3)")
def test_the_death_of_a_watched_process_is_noticed_even_if_nobody_waits_for_it() -> None:
    with child() as process:
        node = Recorder(steps=[[Watch("p1", process.pid)], []])
        node.answers = lambda message: [Stop(0, "")]
        loop = Loop(node, PretendChannel())
        loop._turn()
        assert node.handled == []
        zombie(process)
        assert loop.run() == 0
        assert node.handled == [("p1", msg.Exited("p1"))]
        assert node.turns <= 4


def test_a_process_that_is_gone_already_is_noticed_at_once() -> None:
    with child() as process:
        pid = process.pid
    node = Recorder(steps=[[Watch("p1", pid)], [Stop(0, "")]])
    Loop(node, PretendChannel()).run()
    assert node.handled == [("p1", msg.Exited("p1"))]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd (Linux 5.3)")
def test_when_the_parent_ends_so_does_the_loop() -> None:
    with child() as process:
        node = Recorder()
        loop = Loop(node, PretendChannel(), parent=process.pid)
        loop._turn()
        zombie(process)
        assert loop.run() == 0
        assert node.turns <= 4


def test_a_parent_that_is_gone_already_means_not_to_start() -> None:
    with child() as process:
        pid = process.pid
    node = Recorder()
    assert Loop(node, PretendChannel(), parent=pid).run() == 0
    assert node.turns == 0


def test_without_pidfd_processes_are_looked_at_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    watcher = Watcher(zmq.Poller())
    with child() as process:
        assert watcher.watch("p1", process.pid)
        assert watcher.gone([]) == []
    assert watcher.gone([]) == ["p1"]
    assert watcher.gone([]) == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd (Linux 5.3)")
def test_watching_the_same_process_twice_takes_one_descriptor() -> None:
    watcher = Watcher(zmq.Poller())
    with child() as process:
        for _ in range(5):
            watcher.watch("p1", process.pid)
        watched = len(watcher._peers)
        zombie(process)
        watcher.gone(list(watcher._peers))
    assert watched == 1


@pytest.mark.parametrize("number", ["EMFILE", "ENOSYS", "EPERM"])
def test_a_system_without_pidfd_does_not_make_the_living_dead(
    monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    import errno

    def refuse(pid: int) -> int:
        raise OSError(getattr(errno, number), "not here")

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    assert Watcher(zmq.Poller()).watch("me", os.getpid())


@pytest.mark.parametrize("pid", [2**31, 2**63, 2**80])
def test_a_number_that_no_process_can_have_is_a_process_that_has_ended(pid: int) -> None:
    assert not Watcher(zmq.Poller()).watch("forged", pid)
