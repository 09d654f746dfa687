"""The supervisor and workers that join no router: stopped while they load, or when the next router comes;
and a run folder that somebody removes. Tiny real processes, and a clock of our own."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from baton.cluster import ends
from baton.cluster import supervisor as cluster_module
from baton.cluster.run_folder import PREFIX, RunFolder, sweep, write_missing
from baton.cluster.spare import Spare
from baton.cluster.stuck import (
    IDLE_START_S,
    REJOINS_S,
    STARTS_S,
    STOPPED_START_S,
    TURN_S,
    Absence,
    Awake,
)
from baton.cluster.supervisor import Beside
from baton.host import any_stopped, family, process_stat, processor_time, sees_children
from baton.server.options import key_lines
from tests.patience import until
from tests.pure.actors import (
    Start,
    ended,
    gone,
    home_of,
    info,
    is_up,
    process,
    starting,
    turns,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
needs_children = pytest.mark.skipif(
    not sees_children(),
    reason="this kernel has no /proc/PID/task/*/children (CONFIG_PROC_CHILDREN)",
)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    home_of(tmp_path, monkeypatch)
    with starting(monkeypatch) as begin:
        yield begin


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop it, and wait until it is."""
    process.send_signal(signal.SIGSTOP)
    until(lambda: any_stopped([process.pid]), "the process stands still")


# ---- verdicts


def verdicts(absence: Absence, seconds: float, *, stopped: bool, works: bool) -> list[str]:
    """So many seconds pass, with a look in each."""
    return [
        absence.too_long(second, stopped=stopped, work=second if works else 7)
        for second in range(1, int(seconds) + 1)
    ]


@pytest.mark.parametrize("again", [False, True])
def test_a_worker_that_is_stopped_has_a_short_time(again: bool) -> None:
    found = verdicts(Absence(0.0, again=again), STOPPED_START_S, stopped=True, works=False)
    assert not any(found[:-1])
    assert found[-1].startswith("was stopped for 15 s")


def test_a_start_takes_any_time_as_long_as_it_works() -> None:
    assert not any(verdicts(Absence(0.0), 3 * IDLE_START_S, stopped=False, works=True))


def test_a_start_without_work_is_stuck_after_the_time_of_another_ones_compilation() -> None:
    found = verdicts(Absence(0.0), IDLE_START_S + 1, stopped=False, works=False)
    assert not any(found[:-1])  # the first look sees work: that of before
    assert found[-1] == "did nothing for 600 s of its start"


def test_where_nobody_knows_what_a_process_does_nothing_is_held_against_it() -> None:
    absence = Absence(0.0)
    for second in range(1, 3 * int(IDLE_START_S)):
        assert absence.too_long(second, stopped=False, work=None) == ""


def test_who_was_in_a_cluster_before_has_nothing_to_load() -> None:
    found = verdicts(Absence(0.0, again=True), REJOINS_S, stopped=False, works=True)
    assert not any(found[:-1])
    assert found[-1] == "did not join the new router within 120 s"


def test_only_time_in_which_the_supervisor_ran_counts() -> None:
    awake = Awake()
    absence = Absence(awake.look(0.0))
    for hour in range(1, int(STOPPED_START_S)):
        at = awake.look(3600.0 * hour)
        assert absence.too_long(at, stopped=True, work=7) == ""


# ---- processes


BURNS = """
import sys, time
while time.process_time() < 0.2: pass
print("done", flush=True)
sys.stdin.read()
"""
STARTS = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURNS!r}])"
TWICE = f"{STARTS}\nprint('both', flush=True)\nopen({{gate!r}}).read()"


@needs_children
def test_what_a_process_and_its_children_compute_is_its_work(tmp_path: Path) -> None:
    """While a child runs and when it has ended; and a child that is stopped stops its parent's start."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with subprocess.Popen(
        [sys.executable, "-c", TWICE.format(gate=str(gate))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == b"done\n"
        least = 0.15 * os.sysconf("SC_CLK_TCK")
        pid, child = family(parent.pid)
        assert pid == parent.pid
        assert (processor_time([pid, child]) or 0) >= least
        assert not any_stopped([pid, child])
        os.kill(child, signal.SIGSTOP)
        until(lambda: any_stopped(family(pid)), "the child stands still")
        os.kill(child, signal.SIGCONT)
        parent.stdin.close()
        assert parent.stdout.readline() == b"both\n"
        assert family(pid) == [pid]
        assert (processor_time([pid]) or 0) >= least
        parent.kill()
    assert family(pid) == [pid]
    assert processor_time([pid]) is None
    assert not any_stopped([pid])


def test_a_worker_that_is_stopped_while_it_loads_is_killed_and_started_again(start: Start) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="lasting")
    stopped = process(cluster, "decode-0")
    stop(stopped)
    assert turns(cluster, STOPPED_START_S - 2 * TURN_S) == []
    said, died = turns(cluster, 4 * TURN_S)
    assert said == "decode-0 was stopped for 15 s, in no cluster, and was killed"
    assert died.startswith("decode-0 died (signal 9)")
    assert gone(stopped.pid)
    assert cluster.pids()["decode-0"] != stopped.pid


@pytest.mark.parametrize("sees", [True, False])
def test_an_idle_start_is_held_against_a_worker_only_where_its_compilers_would_be_seen(
    start: Start, monkeypatch: pytest.MonkeyPatch, sees: bool
) -> None:
    monkeypatch.setattr("baton.cluster.stuck.IDLE_START_S", 30.0)
    monkeypatch.setattr(cluster_module, "sees_children", lambda: sees)
    cluster = start(lasting=True, router="lasting", decode_0="lasting")
    is_up(cluster, "decode-0")
    pid = cluster.pids()["decode-0"]
    notes = turns(cluster, 60.0)
    killed = [note for note in notes if note.startswith("decode-0 did nothing for 30 s")]
    assert bool(killed) == sees
    assert (cluster.pids()["decode-0"] == pid) != sees


def test_a_worker_that_does_not_join_the_next_router_is_killed_and_the_others_are_not(
    start: Start,
) -> None:
    """It is wedged, or was stopped when its router died: the next one knows nothing of it."""
    cluster = start(lasting=True, router="lasting", prefill_0="lasting", decode_0="lasting")
    for name in ("prefill-0", "decode-0"):
        is_up(cluster, name)
    cluster.check(info("prefill-0", "decode-0"))
    before = cluster.pids()
    ended(cluster, "router", kill=True)
    cluster.check()
    cluster._children[0].deafen()  # it is not judged by its beats here
    assert turns(cluster, 2 * REJOINS_S) == []  # no router says anything yet: there is none to join
    cluster.check(info("prefill-0", boot="a1"))
    assert turns(cluster, REJOINS_S - 3 * TURN_S) == []
    assert cluster.pids()["decode-0"] == before["decode-0"]
    notes = turns(cluster, 5 * TURN_S)
    assert notes[0] == "decode-0 did not join the new router within 120 s and was killed"
    assert gone(before["decode-0"])
    assert cluster.pids()["prefill-0"] == before["prefill-0"]


def test_a_stopped_spare_becomes_nobody_and_is_replaced(tmp_path: Path) -> None:
    spare = Spare(tmp_path, ())
    try:
        assert spare.keep(0.0)
        assert spare.process is not None
        stopped = spare.process
        stop(stopped)
        assert spare.become(["actor"], tmp_path / "decode-0.log", 1.0) is None
        assert gone(stopped.pid)
        assert spare.keep(1.0)
    finally:
        spare.end()


def alive(pid: int) -> bool:
    """Zombies whose parent does not wait for them are dead."""
    try:
        return process_stat(pid)[0] not in "ZX"
    except IndexError:
        return False


@needs_children
@pytest.mark.parametrize("how", ["dies", "is given up", "the cluster stops"])
def test_what_a_worker_has_started_ends_with_it_though_it_is_stopped(
    start: Start, how: str
) -> None:
    """Another rank that was stopped before it told the kernel to end it with its parent."""
    cluster = start(lasting=True, router="lasting", decode_0="having")
    is_up(cluster, "decode-0")
    worker = process(cluster, "decode-0")
    _, other = family(worker.pid)
    os.kill(other, signal.SIGSTOP)
    until(lambda: any_stopped([other]), "it stands still")
    if how == "dies":
        ended(cluster, "decode-0", kill=True)
        cluster.check()
    elif how == "is given up":
        cluster.check(info("decode-0"))
        cluster.check(info())
    else:
        cluster.stop()
    until(lambda: not alive(other), "the other rank's end")


# ---- the run folder


def test_a_cluster_whose_run_folder_was_removed_makes_it_again_and_its_router_listens_anew(
    start: Start,
) -> None:
    """Whoever is connected goes on; but nobody new finds the router."""
    cluster = start(lasting=True, router="beating 1000", decode_0="lasting")
    is_up(cluster, "router")
    is_up(cluster, "decode-0")
    socket = cluster.run_dir / "router.sock"
    cluster._children[0].command.append(cluster.address)  # it would listen there
    socket.touch()
    cluster.add(Beside("server", ["actor", "beating", "1000"]))  # it connects there
    server = cluster._children[-1]
    until(lambda: cluster.check() == [] and server.restarts.serving, "the server's beats")
    cluster.check(info("decode-0"))
    before = cluster.pids()
    assert turns(cluster, 2 * TURN_S) == []
    shutil.rmtree(cluster.run_dir)
    (note,) = turns(cluster, TURN_S)
    assert note.startswith("router died (its socket was removed, so it was killed")
    assert cluster.pids()["router"] != before["router"]
    assert turns(cluster, 2 * TURN_S) == []
    assert cluster.pids()["server"] == before["server"], "it finds the next router by itself"
    assert cluster.run_dir.stat().st_mode & 0o777 == 0o700
    ended(cluster, "decode-0", kill=True)
    turns(cluster, TURN_S)
    is_up(cluster, "decode-0")  # with a log
    folder = cluster.run_dir
    cluster.stop()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("code", "there"),
    [(errno.ENOENT, False), (errno.ENOTDIR, False)]
    + [(code, True) for code in (errno.EACCES, errno.EIO, errno.ESTALE, errno.ELOOP)],
)
def test_a_path_that_cannot_be_looked_at_counts_as_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, there: bool
) -> None:
    assert cluster_module._is_there(tmp_path)

    def fails(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "stat", fails)
    found = cluster_module._is_there(tmp_path)
    monkeypatch.undo()
    assert found == there


def test_what_a_process_reads_from_the_folder_is_written_again_before_its_next_start(
    start: Start,
) -> None:
    cluster = start(lasting=True, router="lasting")
    keys = cluster.run_dir / "api-keys"
    write = partial(write_missing, keys, key_lines(("one", "two")))
    cluster.add(Beside("server", ["actor", "lasting"], (), write))
    assert keys.read_text() == "one\ntwo\n"
    shutil.rmtree(cluster.run_dir)
    ended(cluster, "server", kill=True)
    turns(cluster, TURN_S)
    assert keys.read_text() == "one\ntwo\n"
    assert keys.stat().st_mode & 0o777 == 0o600


class Immortal(subprocess.Popen[bytes]):
    """It hangs in the kernel: nothing ends it for now."""

    def kill(self) -> None:
        pass


def test_one_that_cannot_be_killed_now_holds_up_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "ENDS_S", 0.01)
    monkeypatch.setattr(ends, "_kill_group", lambda process: None)
    cluster = start(lasting=True, router="lasting", decode_0="lasting", prefill_0="lasting")
    hangs = process(cluster, "decode-0")
    hangs.__class__ = Immortal
    cluster.check(info("decode-0", "prefill-0"))
    (note,) = cluster.check(info("prefill-0"))
    assert note == "decode-0 had stopped answering and was killed"
    ended(cluster, "prefill-0", kill=True)
    (note,) = cluster.check()
    assert note.startswith("prefill-0 died (signal 9)")
    assert cluster.pids()["decode-0"] == hangs.pid
    hangs.__class__ = subprocess.Popen
    ended(cluster, "decode-0", kill=True)  # the kernel lets it go
    cluster.check()
    assert cluster.pids()["decode-0"] != hangs.pid


def hanging(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Who is killed hangs in the kernel. The list of them."""
    killed: list[int] = []
    monkeypatch.setattr(ends, "kill", lambda process, within_s: killed.append(process.pid))
    return killed


def test_a_worker_that_hangs_though_it_was_killed_is_killed_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was stopped in its start, or is listed again and leaves, or the router is a new one."""
    with monkeypatch.context() as patch:
        killed = hanging(patch)
        cluster = start(lasting=True, router="lasting", decode_0="lasting")
        cluster._children[0].deafen()  # it is not judged by its beats here
        stop(process(cluster, "decode-0"))
        (note,) = turns(cluster, 3 * STOPPED_START_S)
        assert note == "decode-0 was stopped for 15 s, in no cluster, and was killed"
        for state in "alive", "leaving":
            cluster.check(info("decode-0", state=state))
            assert turns(cluster, 2 * cluster.options.drain_timeout) == []
            assert cluster.check(info()) == []
        ended(cluster, "router", kill=True)
        cluster.check()
        cluster._children[0].deafen()
        assert turns(cluster, 2 * REJOINS_S) == []
        assert killed == [cluster.pids()["decode-0"]]
    ended(cluster, "decode-0", kill=True)  # the kernel lets it go
    cluster.check()
    assert cluster.pids()["decode-0"] != killed[0]


@pytest.mark.parametrize("name", ["router", "server"])
def test_a_loop_that_hangs_though_it_was_killed_is_killed_once(
    start: Start, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        killed = hanging(patch)
        cluster = start(lasting=True, **{name: "beating 1"})
        pid = cluster.pids()[name]
        assert turns(cluster, 2 * STARTS_S) == []
        assert killed == [pid]
    ended(cluster, name, kill=True)
    (note,) = cluster.check()
    assert note.startswith(f"{name} died (no sign of life ")


@pytest.mark.parametrize("how", ["dies", "the cluster stops"])
def test_the_folder_in_which_the_ranks_of_a_killed_worker_met_is_removed(
    start: Start, how: str
) -> None:
    cluster = start(lasting=True, router="lasting", decode_0="lasting")
    met = cluster.run_dir.with_name(f"{PREFIX}{cluster.pids()['decode-0']}-ranks-x")
    met.mkdir()
    ended(cluster, "decode-0", kill=True)
    if how == "dies":
        cluster.check()
    else:
        cluster.stop()
    assert not met.exists()


def test_a_folder_that_somebody_else_made_in_its_place_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = RunFolder()
    shutil.rmtree(folder.path)
    folder.path.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        folder.make()
    folder.remove()


def test_a_folder_without_locks_and_modes_is_used_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse flock(), and show a mode of their own."""

    def refuses(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuses)
    made = tempfile.mkdtemp

    def open_to_all(**options: str) -> str:
        path = made(**options)
        os.chmod(path, 0o777)
        return path

    monkeypatch.setattr("tempfile.mkdtemp", open_to_all)
    folder = RunFolder()
    folder.make()
    assert (folder.path / "logs").is_dir()
    shutil.rmtree(folder.path)
    folder.make()
    assert (folder.path / "logs").is_dir()
    folder.remove()
    assert not folder.path.exists()


def test_the_folder_of_a_living_owner_is_not_swept_whatever_its_number_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another container the same number may be that of nobody."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    short = subprocess.Popen(["true"])
    short.wait()
    monkeypatch.setattr("os.getpid", lambda: short.pid)
    folder = RunFolder()
    assert folder.path.name.startswith(f"{PREFIX}{short.pid}-")
    sweep()
    assert (folder.path / "logs").is_dir()
    os.close(folder._lock)  # it is killed
    folder._lock = -1
    sweep()
    assert not folder.path.exists()
