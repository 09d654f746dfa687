"""The supervisor's start and end: processes, folders, commands. Tiny real processes, and a clock of our
own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cluster import supervisor as cluster_module
from baton.cluster.options import ClusterOptions
from baton.cluster.run_folder import PREFIX
from baton.cluster.supervisor import Cluster
from baton.host import core_numbers
from baton.topology import Topology
from tests.pure.actors import (
    OPTIONS,
    Start,
    gone,
    home_of,
    process,
    starting,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return home_of(tmp_path, monkeypatch)


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with starting(monkeypatch) as begin:
        yield begin


def test_every_process_is_started_and_nothing_is_said(start: Start) -> None:
    cluster = start(router="lasting", decode_0="lasting")
    assert cluster.check() == []
    assert sorted(cluster.pids()) == ["decode-0", "router"]
    assert all(not gone(pid) for pid in cluster.pids().values())
    assert cluster.run_dir.stat().st_mode & 0o777 == 0o700
    assert cluster.address == f"ipc://{cluster.run_dir}/router.sock"


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
