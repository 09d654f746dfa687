"""Looking after processes: tiny real ones in place of routers and workers, and a clock of our own."""

import errno
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from baton.cluster import supervisor as cluster_module
from baton.cluster.options import ClusterOptions
from baton.cluster.restarts import BACK_OFF_S, CRASH_LOOP, FORGIVE_S
from baton.cluster.stuck import PARDON_S, STARTS_S, STUCK_S, TURN_S
from baton.cluster.supervisor import LEAVES_S, PREFIX, Beside, Cluster
from baton.errors import (
    BatonError,
    InputError,
    ModelError,
    OutOfMemory,
    ProtocolError,
    WorkerLost,
)
from baton.host import core_numbers
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from baton.wire.records import WorkerInfo
from sampler.params import SamplingParams

OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4)

ACTOR = """
import os, signal, sys, time
def lasting(*_):
    print("up", flush=True)
    time.sleep(60)
def dying(code, *_):
    open("death").read()
    print("error: first\\nnoise\\nerror: last words\\nmore noise", file=sys.stderr, flush=True)
    os._exit(int(code))
def leaving(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    lasting()
def deaf(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lasting()
def once(mark, code, *rest):
    if not os.path.exists(mark):
        open(mark, "w").close()
        beating("beats" in rest, *rest)
    dying(code)
def beating(beats, *rest):
    for _ in range(int(beats)):
        os.write(int(rest[rest.index("--pulse") + 1]), b".")
    lasting()
acts = {"lasting": lasting, "dying": dying, "leaving": leaving, "deaf": deaf, "once": once}
acts["beating"] = beating
acts[sys.argv[1]](*sys.argv[2:])
"""


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes run in a folder with one module, `actor`; run folders are made in a temporary one."""
    (tmp_path / "actor.py").write_text(ACTOR)
    (tmp_path / "runs").mkdir()
    os.mkfifo(tmp_path / "death")
    monkeypatch.setattr(cluster_module, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    return tmp_path


Start = Callable[..., Cluster]


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(name="lasting", other="dying 2"): a cluster of such processes, under a pretend clock."""
    made: list[Cluster] = []

    def begin(*, lasting: bool = False, **acts: str) -> Cluster:
        commands = [(name.replace("_", "-"), ["actor", *act.split()]) for name, act in acts.items()]
        monkeypatch.setattr(Cluster, "commands", lambda self: commands)
        cluster = Cluster(OPTIONS, lasting=lasting, clock=Clock())
        made.append(cluster)
        cluster.start()
        return cluster

    yield begin
    for cluster in made:
        cluster.stop()


def process(cluster: Cluster, name: str) -> "subprocess.Popen[bytes]":
    (found,) = [c.process for c in cluster._children if c.name == name]
    assert found is not None
    return found


def clock_of(cluster: Cluster) -> Clock:
    clock = cluster._clock
    assert isinstance(clock, Clock)
    return clock


def turns(cluster: Cluster, seconds: float) -> list[str]:
    """So much time passes in turns of the supervisor. What it says meanwhile."""
    notes, clock = [], clock_of(cluster)
    end = clock.now + seconds
    while clock.now < end:
        clock.now = min(end, clock.now + TURN_S / 2)
        notes += cluster.check()
    return notes


def log_of(cluster: Cluster, name: str) -> Path:
    return cluster.run_dir / "logs" / f"{name}.log"


def is_up(cluster: Cluster, name: str, lives: int = 1) -> None:
    """Wait until the process has said so: then its signal handlers are set. `lives`: its starts."""
    deadline = time.monotonic() + 20
    while log_of(cluster, name).read_text().split().count("up") < lives:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


def ended(cluster: Cluster, name: str, *, kill: bool = False) -> None:
    """Wait until the process has ended, and leave it to the cluster to find out. A dying one waits for
    that: it opens a pipe, which has to be opened here."""
    running, deadline = process(cluster, name), time.monotonic() + 20
    if kill:
        running.kill()
    while not os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        assert time.monotonic() < deadline
        if not kill:
            with suppress(OSError):  # it does not wait yet
                os.close(os.open(cluster_module.ROOT / "death", os.O_WRONLY | os.O_NONBLOCK))
        select.select([], [], [], 0.002)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def info(
    *workers: str, ready: bool = True, state: str = "alive", boot: str = "a1", router: int = 0
) -> ClusterInfo:
    rows = tuple(WorkerInfo(f"{name}.{boot}", "x", "cpu", state) for name in workers)
    return ClusterInfo(
        ready, "m", "f", 100, 50, "float32", SamplingParams(), rows, "", router_pid=router
    )


def test_every_process_is_started_and_nothing_is_said(start: Start) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    assert cluster.check() == []
    assert sorted(cluster.pids()) == ["decode-0", "router"]
    assert all(not gone(pid) for pid in cluster.pids().values())
    assert cluster.run_dir.stat().st_mode & 0o777 == 0o700
    assert cluster.address == f"ipc://{cluster.run_dir}/router.sock"


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


def die_on(cluster: Cluster, name: str, deaths: int) -> list[str]:
    """Let it die so often, and the clock run to each restart. What was said."""
    clock, notes = clock_of(cluster), list[str]()
    for _ in range(deaths):
        ended(cluster, name)
        notes += cluster.check()
        (child,) = [each for each in cluster._children if each.name == name]
        if child.restarts.due is not None:  # at once otherwise
            assert name not in cluster.pids()
            clock.now = child.restarts.due - 0.01
            assert cluster.check() == []
            assert name not in cluster.pids()
            clock.now += 0.02
            cluster.check()
        assert name in cluster.pids()
    return notes


def was_ready(cluster: Cluster) -> None:
    """It was ready once, and is not now. Nobody looks at the processes meanwhile."""
    for ready in (True, False):
        cluster._look_at(info(ready=ready), clock_of(cluster).now, may_kill=False)


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
    assert len(os.listdir("/proc/self/fd")) == open_before - 1


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


def test_stopping_leaves_no_process_and_no_folder(start: Start) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    process(cluster, "decode-0").send_signal(signal.SIGSTOP)  # it will not hear SIGTERM
    pids, folder = cluster.pids(), cluster.run_dir
    cluster.stop()
    assert all(gone(pid) for pid in pids.values())
    assert not folder.exists()
    cluster.stop()


def test_leaving_the_block_stops_everything_whatever_happened(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "commands", lambda self: [("router", ["actor", "lasting"])])
    pids: dict[str, int] = {}

    def work() -> None:
        with Cluster(OPTIONS) as cluster:
            pids.update(cluster.pids())
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        work()
    assert pids
    assert all(gone(pid) for pid in pids.values())
    assert list((home / "runs").iterdir()) == []


def test_a_start_that_fails_half_way_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Cluster, "commands", lambda self: [("a", ["actor", "lasting"]), ("b", ["x"])]
    )
    real, pids = Cluster._spawn, []

    def spawn(self: Cluster, child: cluster_module.Child) -> None:
        if child.name == "b":
            raise OSError("no more processes")
        real(self, child)
        pids.extend(self.pids().values())

    monkeypatch.setattr(Cluster, "_spawn", spawn)
    with pytest.raises(OSError, match="no more processes"), Cluster(OPTIONS):
        pass
    assert len(pids) == 1
    assert gone(pids[0])
    assert list((home / "runs").iterdir()) == []


def test_run_folders_of_dead_owners_are_swept_and_no_others(home: Path, start: Start) -> None:
    short = subprocess.Popen(["true"])
    short.wait()
    runs = home / "runs"
    orphan, ours = runs / f"{PREFIX}{short.pid}-x", runs / f"{PREFIX}{os.getpid()}-x"
    foreign, odd = runs / "other-1-x", runs / f"{PREFIX}abc-x"
    for folder in (orphan, ours, foreign, odd):
        (folder / "logs").mkdir(parents=True)
    start(router="lasting")
    assert not orphan.exists()
    assert ours.exists()
    assert foreign.exists()
    assert odd.exists()


def test_the_commands_are_those_one_would_type(tmp_path: Path) -> None:
    options = ClusterOptions(
        "demo", Topology(("cuda:0",), ("cpu", "cpu")), batch_size=7, max_model_len=64
    )
    commands = dict(Cluster(options).commands())
    assert list(commands) == ["router", "prefill-0", "decode-0", "decode-1"]
    assert commands["router"][0] == "router"
    assert commands["prefill-0"][0] == "prefill_worker"
    assert commands["decode-1"][0] == "decode_worker"
    known = bool(core_numbers())  # then the router hands out cores
    assert ("--threads" in commands["decode-0"]) is not known
    assert "--threads" not in commands["prefill-0"]
    for command in commands.values():
        assert command[command.index("--max-model-len") + 1] == "64"
    assert commands["decode-0"][commands["decode-0"].index("--max-num-seqs") + 1] == "7"


@pytest.mark.parametrize(
    ("prefill", "decode", "beside"),
    [
        (("cuda:0",), ("cuda:0",), [["1", "0"]]),
        (("cuda:0",), ("cuda:1",), [None]),
        (
            ("cuda:0", "cuda:1"),
            ("cuda:0", "cuda:0", "cuda:1"),
            [["1", "1"], ["1", "1"], ["1", "0"]],
        ),
        (("cpu",), ("cpu", "cpu"), [None, None]),
        ((), ("cuda:0",), [None]),
    ],
)
def test_decode_workers_are_told_who_shares_their_gpu(
    prefill: tuple[str, ...], decode: tuple[str, ...], beside: list[list[str] | None]
) -> None:
    topology = Topology(prefill, decode, colocated=not prefill)
    commands = dict(Cluster(ClusterOptions("demo", topology, batch_size=1)).commands())
    told = []
    for index in range(len(decode)):
        command = commands[f"decode-{index}"]
        at = command.index("--beside") + 1 if "--beside" in command else None
        told.append(command[at : at + 2] if at is not None else None)
    assert told == beside
    assert not any("--beside" in command for name, command in commands.items() if "prefill" in name)


def test_logs_are_kept_where_the_environment_says_so(
    home: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_KEEP_LOGS", str(home / "kept"))
    cluster = start(router="lasting")
    run_dir = cluster.run_dir
    cluster.stop()
    assert not run_dir.exists()
    assert (home / "kept" / run_dir.name / "router.log").is_file()


def test_a_model_folder_is_named_from_the_root_whatever_the_folder_we_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    options = ClusterOptions("model", Topology(("cpu",), ("cpu",)), batch_size=1)
    for _, command in Cluster(options).commands():
        assert command[command.index("--model") + 1] == str(tmp_path / "model")


def test_colocated_there_is_no_prefill_command() -> None:
    options = ClusterOptions("demo", Topology((), ("cpu",), True), batch_size=1)
    commands = dict(Cluster(options).commands())
    assert list(commands) == ["router", "decode-0"]
    assert "--colocated" in commands["router"]
