"""The supervisor when a process ends as it was told to, stops answering, or is stuck. Tiny real
processes, and a clock of our own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cluster.stuck import PARDON_S, STARTS_S, STUCK_S, TURN_S
from baton.cluster.supervisor import LEAVES_S
from tests.pure.actors import (
    OPTIONS,
    Start,
    clock_of,
    die_on,
    ended,
    gone,
    home_of,
    info,
    is_up,
    process,
    starting,
    turns,
)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    home_of(tmp_path, monkeypatch)
    with starting(monkeypatch) as begin:
        yield begin


# ---- ending when told to


@pytest.mark.parametrize("act", ["leaving", "dying 1"])
def test_what_may_end_is_not_started_again_and_the_others_are(start: Start, act: str) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="lasting", server=act)
    pid = cluster.pids()["server"]
    assert cluster.let_end("server") == pid
    ended(cluster, "server", kill=act == "leaving")
    ended(cluster, "decode-0", kill=True)
    (note,) = cluster.check()
    assert note.startswith("decode-0 died (signal 9) and is started again")
    clock_of(cluster).now += 100
    assert cluster.check() == []
    assert sorted(cluster.pids()) == ["decode-0", "router"]
    assert cluster.let_end("server") is None


def test_a_start_that_was_planned_is_dropped(start: Start) -> None:
    cluster = start(lasting=True, router="lasting", server="dying 1")
    die_on(cluster, "server", 1)
    ended(cluster, "server")
    cluster.check()
    assert cluster.let_end("server") is None
    clock_of(cluster).now += 100
    assert cluster.check() == []
    assert list(cluster.pids()) == ["router"]


def test_a_worker_that_ends_after_sigterm_is_replaced_at_once_and_it_is_no_death(
    start: Start,
) -> None:
    cluster = start(router="lasting", decode_0="leaving")
    is_up(cluster, "decode-0")
    cluster.check(info("decode-0"))
    before = process(cluster, "decode-0")
    cluster.check(info("decode-0", state="leaving"))
    assert cluster.check(info()) == []  # dismissed, and about to end: it is not stalled
    before.terminate()
    ended(cluster, "decode-0")
    assert cluster.check() == ["decode-0 ended as it was told to (SIGTERM) and is started again"]
    assert cluster.pids()["decode-0"] != before.pid
    assert cluster.down() == ()


def test_a_worker_that_does_not_end_in_time_is_killed(start: Start) -> None:
    cluster = start(router="lasting", decode_0="deaf")
    is_up(cluster, "decode-0")
    cluster.check(info("decode-0"))
    before = process(cluster, "decode-0")
    before.terminate()
    cluster.check(info("decode-0", state="leaving"))
    clock_of(cluster).now += 3600  # the supervisor was stopped
    assert cluster.check() == []
    assert turns(cluster, OPTIONS.drain_timeout + LEAVES_S - TURN_S - 0.01) == []
    assert turns(cluster, 0.02)[0] == "decode-0 did not end after SIGTERM and was killed"
    assert cluster.pids()["decode-0"] != before.pid


def test_an_end_before_joining_is_a_death_whatever_its_code(start: Start) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="dying 0")
    die_on(cluster, "decode-0", 3)
    assert cluster.down()[0].deaths == 3


def test_a_worker_the_router_has_given_up_is_killed_and_started_again(start: Start) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    stalled = process(cluster, "decode-0")
    stalled.send_signal(signal.SIGSTOP)
    assert cluster.check(info()) == []  # it has not joined yet: it may be loading
    assert cluster.check(info("decode-0")) == []
    notes = cluster.check(info())
    assert notes[0] == "decode-0 had stopped answering and was killed"
    assert cluster.pids()["decode-0"] != stalled.pid
    assert gone(stalled.pid)
    assert cluster.check(info()) == []  # the new one is loading
    assert [each.why for each in cluster.down()] == ["signal 9"]


@pytest.mark.parametrize("name", ["router", "server-0"])
def test_a_process_whose_loop_is_stuck_is_killed_and_started_again(start: Start, name: str) -> None:
    cluster = start(lasting=True, **{name.replace("-", "_"): "beating 3"})
    limit_s = STUCK_S[name.partition("-")[0]]
    for life in (1, 2):
        is_up(cluster, name, life)
        before = cluster.pids()[name]
        assert turns(cluster, TURN_S) == []  # it is heard
        clock_of(cluster).now += 3600  # the supervisor was stopped
        assert cluster.check() == []
        # It was heard in the last two turns, or, if it is fast, up to three before.
        assert turns(cluster, limit_s - 5.5 * TURN_S) == []
        assert cluster.pids()[name] == before
        (note,) = turns(cluster, 6 * TURN_S)
        assert note.startswith(
            f"{name} died (no sign of life for {limit_s:.0f} s, so it was killed"
        )
        assert gone(before)
        turns(cluster, TURN_S)
        assert cluster.pids()[name] != before


def test_a_process_that_never_shows_life_is_given_the_time_of_a_slow_start(start: Start) -> None:
    cluster = start(lasting=True, router="lasting")
    before = cluster.pids()["router"]
    assert turns(cluster, STARTS_S - TURN_S) == []
    (note,) = turns(cluster, 2 * TURN_S)
    assert f"no sign of life {STARTS_S:.0f} s after its start, so it was killed" in note
    assert gone(before)


def test_a_process_that_may_end_is_not_watched(start: Start) -> None:
    cluster = start(lasting=True, server="beating 1")
    is_up(cluster, "server")
    turns(cluster, TURN_S)
    before = cluster.let_end("server")
    assert turns(cluster, 3 * STUCK_S["server"]) == []
    assert cluster.pids()["server"] == before


def test_every_life_has_its_own_pipe_and_leaves_none(start: Start) -> None:
    cluster = start(lasting=True, router="beating 1000")
    is_up(cluster, "router")
    turns(cluster, TURN_S)
    open_before = len(os.listdir("/proc/self/fd"))
    for life in (2, 3, 4):
        ended(cluster, "router", kill=True)
        turns(cluster, 4 * TURN_S)
        is_up(cluster, "router", life)
    turns(cluster, TURN_S)
    assert len(os.listdir("/proc/self/fd")) == open_before
    cluster.stop()
    assert len(os.listdir("/proc/self/fd")) == open_before - 2  # the pipe, the run folder's lock


def test_late_words_of_a_dead_router_kill_nobody(start: Start) -> None:
    """They are on their way when it dies. Without this, the first words of the next router, which lists
    nobody yet, would be an accusation."""
    cluster = start(router="lasting", decode_0="lasting")
    first = cluster.pids()["router"]
    cluster.check(info("decode-0", router=first))
    ended(cluster, "router", kill=True)
    cluster.check(info("decode-0", router=first))
    second, worker = cluster.pids()["router"], cluster.pids()["decode-0"]
    assert second != first
    for said, router in (("decode-0", first), ("", second), ("", first)):
        assert cluster.check(info(*[said] * bool(said), router=router)) == []
    assert cluster.pids()["decode-0"] == worker
    cluster.check(info("decode-0", router=second))
    assert cluster.check(info(router=second))[0] == "decode-0 had stopped answering and was killed"


def test_after_a_pause_of_everybody_workers_may_join_again_before_any_is_killed(
    start: Start,
) -> None:
    cluster = start(router="lasting", prefill_0="lasting", decode_0="lasting")
    cluster.check(info("prefill-0", "decode-0"))
    before = cluster.pids()
    clock_of(cluster).now += 3600
    assert cluster.check(info()) == []  # the router woke first, and has heard from nobody
    assert turns(cluster, PARDON_S - 2 * TURN_S) == []
    assert cluster.check(info("decode-0", boot="a1")) == []
    assert turns(cluster, TURN_S) == []
    assert cluster.pids() == before
    notes = turns(cluster, 2 * TURN_S)  # without another word of the router
    assert notes[0] == "prefill-0 had stopped answering and was killed"
    assert [name for name, pid in cluster.pids().items() if pid != before[name]] == ["prefill-0"]


def test_after_a_router_has_died_nobody_is_given_up_before_joining_the_next(start: Start) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    before = cluster.pids()["decode-0"]
    cluster.check(info("decode-0"))
    ended(cluster, "router", kill=True)
    cluster.check()
    assert cluster.check(info()) == []
    assert cluster.pids()["decode-0"] == before
