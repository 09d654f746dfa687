"""Tiny real processes in place of routers and workers, and a clock of our own: what tests of the
supervisor share."""

import os
import select
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from baton.cluster import supervisor as cluster_module
from baton.cluster.options import ClusterOptions
from baton.cluster.stuck import TURN_S
from baton.cluster.supervisor import Cluster
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from baton.wire.records import WorkerInfo
from sampler.params import SamplingParams
from tests.patience import OUTLIVES_S, patiently, until

OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4)

ACTOR = f"""
import os, signal, sys, time
def lasting(*_):
    os.write(1, b"up\\n")  # at once: print() may write the line's end by itself, or be killed before
    time.sleep({OUTLIVES_S})
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
def having(*_):
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
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
acts = {{"lasting": lasting, "dying": dying, "leaving": leaving, "deaf": deaf, "once": once}}
acts["beating"] = beating
acts["having"] = having
acts[sys.argv[1]](*sys.argv[2:])
"""


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def home_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes run in a folder with one module, `actor`; run folders are made in a temporary one."""
    (tmp_path / "actor.py").write_text(ACTOR)
    (tmp_path / "runs").mkdir()
    os.mkfifo(tmp_path / "death")
    monkeypatch.setattr(cluster_module, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    return tmp_path


Start = Callable[..., Cluster]


@contextmanager
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(name="lasting", other="dying 2"): a cluster of such processes, under a pretend clock. They
    run in the folder that `home_of` has made."""
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
    log = log_of(cluster, name)
    until(
        lambda: log.read_text().split().count("up") >= lives,
        lambda: f"life {lives} of {name}, whose log is: {log.read_text()}",
    )


def ended(cluster: Cluster, name: str, *, kill: bool = False) -> None:
    """Wait until the process has ended, and leave it to the cluster to find out. A dying one waits for
    that: it opens a pipe, which has to be opened here."""
    running = process(cluster, name)
    if kill:
        running.kill()
    for _ in patiently(lambda: f"the end of {name}, {running.args}"):
        if os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return
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
