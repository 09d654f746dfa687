"""Owners of one process, with tiny real processes: started with keys, restarted, drained, removed."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cluster import supervisor
from baton.cluster.options import ClusterOptions
from baton.cluster.owner import API_KEYS, HOST, KEYS, Look, Order, Owner
from baton.package import own_version
from baton.topology import Topology
from tests import patience
from tests.patience import OUTLIVES_S
from tests.pure.actors import info

OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4)
PROCESS = f"""
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
new = f"life-{{os.getpid()}}.new"
with open(new, "w") as file:
    json.dump(sys.argv[1:], file)
os.rename(new, f"life-{{os.getpid()}}")
time.sleep({OUTLIVES_S})
"""

Start = Callable[..., Owner]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "process.py").write_text(PROCESS)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(supervisor, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    made: list[Owner] = []

    def begin(name: str = "decode-0", version: str = own_version()) -> Owner:
        command = ("process", "--keys", KEYS, "--kv-host", HOST, "--api-key-file", API_KEYS)
        keys = {"member.secret": b"s" * 40, "member.public": b"p" * 40}
        made.append(Owner(Order(name, command, OPTIONS, version, keys, b"key\n"), "10.0.0.7", "n7"))
        return made[-1]

    yield begin
    for each in made:
        each.stop()


def lives(home: Path, count: int) -> list[Path]:
    """Wait until so many processes have begun, and find what they wrote, by process id."""

    def begun() -> list[Path] | None:
        found = [p for p in home.glob("life-*") if p.suffix != ".new"]
        return found if len(found) >= count else None

    found = patience.until(begun, f"{count} processes")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def until(owner: Owner, runs: bool) -> tuple[str, ...]:
    """Look until the process runs, or does not. The notes meanwhile."""
    notes: list[str] = []

    def settled() -> bool:
        look = owner.look()
        notes.extend(look.notes)
        return look.runs == runs

    patience.until(settled, lambda: f"runs is {runs}; {notes}")
    return tuple(notes)


@pytest.mark.parametrize("name", ["decode-0", "server"])
def test_a_process_gets_its_keys_and_the_address_of_the_node(
    start: Start, home: Path, name: str
) -> None:
    owner = start(name)
    (life,) = lives(home, 1)
    words = json.loads(life.read_text())
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--kv-host"] == "10.0.0.7"
    assert given["--parent"] == str(os.getpid())
    secret = Path(given["--keys"]) / "member.secret"
    assert secret.read_bytes() == b"s" * 40
    assert Path(given["--api-key-file"]).read_bytes() == b"key\n"
    for path in (secret, Path(given["--api-key-file"])):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (owner.look().host, owner.look().node, owner.look().runs) == ("10.0.0.7", "n7", True)


def test_a_process_that_cannot_work_here_is_told_also_while_the_service_is_ready(
    start: Start, home: Path
) -> None:
    """So that it is placed somewhere else."""
    (home / "process.py").write_text("import sys; sys.exit(6)")
    owner = start()
    ready, looks = info(), list[Look]()

    def ended() -> bool:
        looks.append(owner.look(ready))
        return bool(looks[-1].exit_code)

    patience.until(ended, "the process, which ends by itself")
    look = looks[-1]
    assert look.exit_code == 6


def test_a_process_that_died_is_started_again_by_the_next_look(start: Start, home: Path) -> None:
    owner = start()
    (life,) = lives(home, 1)
    os.kill(int(life.name.partition("-")[2]), 9)

    def noted() -> Look | None:
        look = owner.look()
        return look if look.notes else None

    look = patience.until(noted, "the news of its death")
    assert "decode-0 died (signal 9) and is started again" in look.notes[0]
    assert [(each.name, each.why) for each in look.down] == [("decode-0", "signal 9")]
    assert look.down[0].log.startswith("10.0.0.7:")
    lives(home, 2)
    assert owner.look().runs


@pytest.mark.parametrize("name", ["decode-0", "server"])
@pytest.mark.parametrize("removed", ["all", "the keys", "the API keys"])
def test_what_a_cleaner_removed_is_written_again_before_the_next_start(
    start: Start, home: Path, name: str, removed: str
) -> None:
    owner = start(name)
    (life,) = lives(home, 1)
    words = json.loads(life.read_text())
    keys, api_keys = (Path(words[words.index(each) + 1]) for each in ("--keys", "--api-key-file"))
    if removed == "the API keys":
        api_keys.unlink()
    else:
        shutil.rmtree(keys if removed == "the keys" else keys.parent)
    os.kill(int(life.name.partition("-")[2]), 9)
    patience.until(lambda: owner.look().notes, "the news of its death")
    lives(home, 2)
    assert (keys / "member.secret").read_bytes() == b"s" * 40
    assert sorted(each.name for each in keys.iterdir()) == ["member.public", "member.secret"]
    assert api_keys.read_bytes() == b"key\n"
    for path in (keys / "member.secret", api_keys):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.parent.stat().st_mode) == stat.S_IMODE(keys.stat().st_mode) == 0o700


def test_a_process_that_leaves_is_not_started_again(start: Start, home: Path) -> None:
    owner = start()
    lives(home, 1)
    owner.leave()
    assert until(owner, runs=False) == ()
    assert not owner.look().runs
    assert owner.look().exit_code == 0


def test_another_version_is_refused_before_anything_is_started(start: Start, home: Path) -> None:
    look = start(version="0.0.1").look()
    assert (look.runs, look.exit_code) == (False, 2)
    assert f"baton {own_version()} is installed on 10.0.0.7, and 0.0.1 was started" in look.why
    assert not list(home.glob("life-*"))


def test_nothing_is_left_of_an_owner_that_was_stopped(start: Start, home: Path) -> None:
    owner = start()
    (life,) = lives(home, 1)
    owner.stop()
    assert not list((home / "runs").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(life.name.partition("-")[2]), 0)
