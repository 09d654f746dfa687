"""The idle process: it becomes the command it is given, ends with its parent, and is replaced."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cluster.spare import Spare
from baton.cluster.standby import COMMAND, ROOM
from baton.package import ROOT
from tests.cluster.processes import Ends, children_of
from tests.patience import OUTLIVES_S, PATIENCE_S, until

ACTOR = f"""
import json, os, sys, time
if __name__ == "__main__":
    heavy = "heavy" in sys.modules
    print(json.dumps({{"pid": os.getpid(), "argv": sys.argv[1:], "heavy": heavy}}), flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    assert sys.stdin.read() == ""
    if "stays" in sys.argv:
        time.sleep({OUTLIVES_S})
    sys.exit(7)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules for processes to find: an actor, one that takes long to import, one that fails."""
    (tmp_path / "actor.py").write_text(ACTOR)
    (tmp_path / "heavy.py").write_text("")
    (tmp_path / "slow.py").write_text(f"open({str(tmp_path / 'gate')!r}).read()")
    (tmp_path / "broken.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


Make = Callable[..., Spare]


@pytest.fixture
def make(home: Path) -> Iterator[Make]:
    made: list[Spare] = []

    def begin(*modules: str) -> Spare:
        made.append(Spare(home, modules))
        assert made[-1].keep(0.0)
        return made[-1]

    yield begin
    for spare in made:
        spare.end()


def became(spare: Spare, home: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    process = spare.become(["actor", *arguments], home / "decode-0.log", 1.0)
    assert process is not None
    assert spare.process is None
    return process


def said(home: Path) -> list[str]:
    return (home / "decode-0.log").read_text().splitlines()


def test_it_becomes_the_command_with_its_imports_its_log_and_its_exit_code(
    make: Make, home: Path
) -> None:
    (home / "decode-0.log").write_text("an earlier life\n")
    spare = make("heavy")
    assert spare.process is not None
    pid = spare.process.pid
    process = became(spare, home, "--name", "decode-0")
    assert process.wait(PATIENCE_S) == 7
    first, line, *rest = said(home)
    assert (first, rest) == ("an earlier life", ["to stderr"])
    found = json.loads(line)
    assert found["pid"] == process.pid == pid
    assert found["argv"][:3] == ["--name", "decode-0", "--idle"]
    assert float(found["argv"][3]) >= 0
    assert found["heavy"]


def test_whoever_looks_for_a_worker_finds_it_under_its_own_name(make: Make, home: Path) -> None:
    spare = make()
    assert spare.process is not None
    pid = spare.process.pid
    until(lambda: children_of(os.getpid()).get("standby") == pid, "its first command line")
    process = became(spare, home, "stays", "--name", "decode-0")
    found = until(lambda: children_of(os.getpid()).get("decode-0"), "its name")
    assert found == pid
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert words == [os.fsencode(sys.executable), b"-m", b"actor", b"stays", b"--name", b"decode-0"]
    process.kill()
    process.wait()


def test_an_order_given_during_the_imports_is_shown_at_once_and_carried_out_after_them(
    make: Make, home: Path
) -> None:
    os.mkfifo(home / "gate")
    process = became(make("slow", "heavy"), home, "--name", "decode-0")
    until(lambda: children_of(os.getpid()).get("decode-0") == process.pid, "its name")
    assert said(home) == []
    (home / "gate").write_text("")
    assert process.wait(PATIENCE_S) == 7
    assert json.loads(said(home)[0])["heavy"]


def test_a_command_longer_than_the_room_is_run_all_the_same(make: Make, home: Path) -> None:
    process = became(make(), home, "x" * (2 * len(ROOM)))
    assert process.wait(PATIENCE_S) == 7
    assert len(json.loads(said(home)[0])["argv"][0]) == 2 * len(ROOM)


def test_its_death_is_no_event_and_one_that_keeps_dying_is_started_less_and_less(
    make: Make, home: Path
) -> None:
    spare = make("broken")
    now, starts = 0.0, []
    while len(starts) < 4:
        if spare.process is not None:
            spare.process.wait(PATIENCE_S)
        if spare.keep(now):
            starts.append(now)
        now += 0.25
    assert starts == [0.0, 0.75, 2.0, 4.25]  # a quarter of a second passes until a death is seen
    assert "not here" in (home / "spare.log").read_text()


def test_a_dead_one_is_not_given_a_command(make: Make, home: Path) -> None:
    spare = make()
    assert spare.process is not None
    spare.process.kill()
    os.waitid(os.P_PID, spare.process.pid, os.WEXITED | os.WNOWAIT)
    assert spare.become(["actor"], home / "decode-0.log", 1.0) is None
    assert spare.keep(1.0)


PARENT = """
import subprocess, sys, os
command = [sys.executable, "-m", sys.argv[1], str(os.getpid()), " "]
print(subprocess.Popen(command, stdin=subprocess.PIPE).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["kill", "close"])
def test_it_ends_with_its_parent(how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, COMMAND],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdin is not None
        ends = Ends({"standby": int(parent.stdout.readline())})
        parent.kill() if how == "kill" else parent.stdin.close()
    ends.wait()
