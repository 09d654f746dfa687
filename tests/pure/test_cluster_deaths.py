"""The supervisor when processes die: what is started again, when, and what is said of it. Tiny real
processes, and a clock of our own."""

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cluster.restarts import BACK_OFF_S, CRASH_LOOP, FORGIVE_S
from baton.cluster.stuck import TURN_S
from baton.cluster.supervisor import Beside
from baton.errors import (
    BatonError,
    InputError,
    ModelError,
    OutOfMemory,
    ProtocolError,
    WorkerLost,
)
from tests.pure.actors import (
    Start,
    clock_of,
    die_on,
    ended,
    home_of,
    info,
    is_up,
    log_of,
    starting,
    turns,
    was_ready,
)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    home_of(tmp_path, monkeypatch)
    with starting(monkeypatch) as begin:
        yield begin


def test_what_dies_is_started_again_at_once_the_first_time(start: Start) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    before = cluster.pids()
    ended(cluster, "decode-0", kill=True)
    log = log_of(cluster, "decode-0")
    assert cluster.check() == [f"decode-0 died (signal 9) and is started again; its log: {log}"]
    after = cluster.pids()
    assert after["decode-0"] != before["decode-0"]
    assert after["router"] == before["router"]
    assert json.loads((cluster.run_dir / "pids.json").read_text()) == after


def test_a_service_goes_on_whatever_dies_and_waits_longer_each_time(start: Start) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="dying 1")
    was_ready(cluster)
    begun, deaths = clock_of(cluster).now, len(BACK_OFF_S) + 4
    notes = die_on(cluster, "decode-0", deaths)
    waited = clock_of(cluster).now - begun
    assert waited == pytest.approx(sum(BACK_OFF_S) + 4 * BACK_OFF_S[-1], abs=0.2)
    log = log_of(cluster, "decode-0")
    assert len(notes) == len(BACK_OFF_S)  # nothing new is said after that
    assert notes[1] == (
        "decode-0 died (exit code 1: last words, death 2) and is started again in 0.5 s; "
        f"its log: {log}"
    )
    assert notes[-1].startswith("decode-0 died (exit code 1: last words, death 8)")
    assert "is started again every 30 s until it works" in notes[-1]
    (down,) = cluster.down()
    assert (down.name, down.role, down.deaths) == ("decode-0", "decode", 1)  # within a minute
    assert (down.why, down.log) == ("exit code 1: last words", str(log))
    assert cluster.check(info("decode-0")) == [f"decode-0 works again, after {deaths} deaths"]
    assert cluster.down() == ()
    ended(cluster, "decode-0")  # hardly any service: it waits as long as before, but that is news
    assert "is started again every 30 s" in cluster.check()[0]


@pytest.mark.parametrize("name", ["router", "server"])
def test_a_service_outlives_its_router_and_its_server_too(start: Start, name: str) -> None:
    cluster = start(lasting=True, decode_0="lasting", **{name: "dying 1"})
    was_ready(cluster)
    notes = die_on(cluster, name, CRASH_LOOP + 2)
    assert len(notes) == CRASH_LOOP + 2
    assert "decode-0" in cluster.pids()


def test_a_job_ends_if_only_crash_loops_are_left_of_a_cluster_that_is_not_ready(
    start: Start,
) -> None:
    cluster = start(router="lasting", decode_0="dying 1")
    cluster.check(info(ready=False))
    die_on(cluster, "decode-0", CRASH_LOOP - 1)
    ended(cluster, "decode-0")
    with pytest.raises(WorkerLost, match=r"died 5 times, the last time with .*1: last words") as it:
        cluster.check()
    assert it.value.exit_code == 1


@pytest.mark.parametrize("loading_s", [2.0, 12.0, 900.0])
def test_the_start_of_a_service_ends_after_as_many_attempts_however_long_each_takes(
    start: Start, loading_s: float
) -> None:
    """Nobody uses it yet, and somebody waits for it."""
    cluster = start(lasting=True, router="lasting", decode_0="dying 1")
    for _ in range(CRASH_LOOP - 1):
        clock_of(cluster).now += loading_s
        die_on(cluster, "decode-0", 1)
    clock_of(cluster).now += loading_s
    ended(cluster, "decode-0")
    with pytest.raises(WorkerLost, match=r"died 5 times, the last time with .*1: last words"):
        cluster.check()


def test_a_job_goes_on_while_the_cluster_is_ready(start: Start) -> None:
    """Decode workers fill by themselves while no prefill worker lives."""
    cluster = start(router="lasting", decode_0="lasting", prefill_0="dying 1")
    cluster.check(info("decode-0"))
    die_on(cluster, "prefill-0", CRASH_LOOP + 2)
    ended(cluster, "decode-0", kill=True)
    cluster.check()
    cluster.check(info(ready=False))
    die_on(cluster, "prefill-0", 1)  # decode-0 has died once only: it is worth the wait
    cluster.check(info("decode-0", boot="a2"))
    die_on(cluster, "prefill-0", 1)


def test_a_job_ends_with_a_router_that_keeps_dying(start: Start) -> None:
    cluster = start(router="dying 1", decode_0="lasting")
    die_on(cluster, "router", CRASH_LOOP - 1)
    ended(cluster, "router")
    with pytest.raises(WorkerLost, match="router died 5 times"):
        cluster.check()


def test_after_some_service_a_death_costs_no_wait(start: Start) -> None:
    cluster = start(decode_0="lasting")
    for life in range(CRASH_LOOP + 1):
        cluster.check(info("decode-0", boot=f"b{life}"))
        clock_of(cluster).now += FORGIVE_S
        ended(cluster, "decode-0", kill=True)
        cluster.check()
        assert list(cluster.pids()) == ["decode-0"]


def test_what_the_router_still_says_of_a_dead_worker_is_not_taken_for_its_successor(
    start: Start,
) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    cluster.check(info("decode-0", boot="old"))
    ended(cluster, "decode-0", kill=True)
    cluster.check()
    second = cluster.pids()["decode-0"]
    cluster.check(info("decode-0", boot="old"))
    assert [each.name for each in cluster.down()] == ["decode-0"]
    assert cluster.check(info()) == []
    assert cluster.pids()["decode-0"] == second


def test_the_last_words_are_those_of_the_last_life(start: Start, tmp_path: Path) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    with log_of(cluster, "decode-0").open("a") as log:
        log.write("error: long ago\n")
    ended(cluster, "decode-0", kill=True)
    assert "(signal 9: long ago)" in cluster.check()[0]
    ended(cluster, "decode-0", kill=True)
    assert "(signal 9, death 2)" in cluster.check()[0]


def test_a_traceback_ends_with_last_words_too(start: Start) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="no-such-act")
    ended(cluster, "decode-0")
    assert "(exit code 1: KeyError: 'no-such-act')" in cluster.check()[0]


def test_that_no_process_can_be_started_is_a_death_like_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="lasting")
    real = subprocess.Popen

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    ended(cluster, "decode-0", kill=True)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    notes = cluster.check()
    assert "it cannot be started: Cannot allocate memory, death 2" in notes[1]
    monkeypatch.setattr(subprocess, "Popen", real)
    clock_of(cluster).now += cluster.down()[0].restart_in_s
    assert cluster.check() == []
    assert "decode-0" in cluster.pids()


@pytest.mark.parametrize(
    ("code", "kind"),
    [(2, InputError), (3, ModelError), (4, ProtocolError), (6, OutOfMemory)],
)
def test_what_will_never_work_is_raised_with_its_last_words(
    start: Start, code: int, kind: type[BatonError]
) -> None:
    cluster = start(decode_0=f"dying {code}")
    ended(cluster, "decode-0")
    with pytest.raises(kind, match=r"^last words$"):
        cluster.check()


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_an_exit_code_is_final_only_for_what_has_never_worked(
    start: Start, tmp_path: Path, code: int
) -> None:
    cluster = start(router="lasting", decode_0=f"once {tmp_path}/mark {code}")
    is_up(cluster, "decode-0")
    cluster.check(info("decode-0"))
    ended(cluster, "decode-0", kill=True)
    cluster.check()
    ended(cluster, "decode-0")
    assert f"exit code {code}: last words" in cluster.check()[0]


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_a_service_that_was_ready_does_not_end_for_a_worker_that_never_worked(
    start: Start, code: int
) -> None:
    """One more decode worker loads while the first serves, and does not find the memory for it."""
    cluster = start(lasting=True, router="lasting", decode_0="lasting", decode_1=f"dying {code}")
    cluster.check(info("decode-0"))
    ended(cluster, "decode-1")
    (note,) = cluster.check()
    assert note.startswith(f"decode-1 died (exit code {code}: last words) and is started again;")


def test_a_server_whose_loop_has_turned_is_a_server_that_has_worked(
    start: Start, tmp_path: Path
) -> None:
    cluster = start(lasting=True, server=f"once {tmp_path}/mark 2 beats")
    is_up(cluster, "server")
    cluster.check()
    ended(cluster, "server", kill=True)
    cluster.check()
    assert [each.name for each in cluster.down()] == ["server"]
    ended(cluster, "server")
    assert "exit code 2" in cluster.check()[0]


def test_a_server_that_serves_between_its_deaths_is_in_no_crash_loop(start: Start) -> None:
    cluster = start(lasting=True, server="beating 1")
    for life in range(1, CRASH_LOOP + 3):
        is_up(cluster, "server", life)
        assert turns(cluster, FORGIVE_S + TURN_S) == []
        assert cluster.down() == ()
        ended(cluster, "server", kill=True)
        (note,) = cluster.check()
        assert note.startswith("server died (signal 9) and is started again;")


def test_what_runs_beside_logs_to_the_terminal(start: Start) -> None:
    cluster = start(lasting=True, router="lasting")
    cluster.add(Beside("server", ["actor", "dying", "1"]))
    ended(cluster, "server")
    assert cluster.check()[0].endswith("and is started again; its log: this terminal")
