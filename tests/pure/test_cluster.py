"""Looking after processes: tiny real ones in place of routers and workers, and a clock of our own."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cluster import supervisor as cluster_module
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import BACK_OFF_S, CRASH_LOOP, PREFIX, Cluster
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

OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4)

ACTOR = """
import os, sys, time
def lasting(*_):
    print("up", flush=True)
    time.sleep(60)
def dying(code, *_):
    print("error: first\\nnoise\\nerror: last words\\nmore noise", file=sys.stderr, flush=True)
    os._exit(int(code))
{"lasting": lasting, "dying": dying}[sys.argv[1]](*sys.argv[2:])
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
    monkeypatch.setattr(cluster_module, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    return tmp_path


Start = Callable[..., Cluster]


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(name="lasting", other="dying 2"): a cluster of such processes, under a pretend clock."""
    made: list[Cluster] = []

    def begin(**acts: str) -> Cluster:
        commands = [(name.replace("_", "-"), ["actor", *act.split()]) for name, act in acts.items()]
        monkeypatch.setattr(Cluster, "commands", lambda self: commands)
        cluster = Cluster(OPTIONS, clock=Clock())
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


def ended(cluster: Cluster, name: str, *, kill: bool = False) -> None:
    """Wait until the process has ended, and leave it to the cluster to find out."""
    running = process(cluster, name)
    if kill:
        running.kill()
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def info(*workers: str) -> ClusterInfo:
    rows = tuple(WorkerInfo(f"{name}.a1b2c3", "x", "cpu", "alive") for name in workers)
    return ClusterInfo(True, "m", "f", 100, 50, "float32", {}, rows, "")


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
    assert cluster.check() == ["decode-0 died (signal 9) and is started again"]
    after = cluster.pids()
    assert after["decode-0"] != before["decode-0"]
    assert after["router"] == before["router"]


def test_restarts_wait_longer_each_time_and_then_it_is_enough(start: Start) -> None:
    cluster = start(decode_0="dying 1")
    clock = cluster._clock
    assert isinstance(clock, Clock)
    deaths, _ = CRASH_LOOP
    for death in range(deaths - 1):
        ended(cluster, "decode-0")
        assert len(cluster.check()) == 1
        if BACK_OFF_S[death]:
            clock.now += BACK_OFF_S[death] - 0.01
            assert cluster.check() == []
            assert cluster.pids() == {}
            clock.now += 0.02
            cluster.check()
        assert list(cluster.pids()) == ["decode-0"]
    ended(cluster, "decode-0")
    with pytest.raises(
        WorkerLost, match=r"died 5 times within 60 s.*exit code 1: last words"
    ) as it:
        cluster.check()
    assert it.value.exit_code == 1


def test_deaths_of_long_ago_are_forgotten(start: Start) -> None:
    cluster = start(decode_0="lasting")
    clock = cluster._clock
    assert isinstance(clock, Clock)
    for _ in range(CRASH_LOOP[0] + 1):
        ended(cluster, "decode-0", kill=True)
        cluster.check()
        assert list(cluster.pids()) == ["decode-0"]
        clock.now += CRASH_LOOP[1]


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
