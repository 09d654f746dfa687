"""The cache on disk: what goes first, what killed processes leave, who may be working meanwhile."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from baton import cache
from baton.cache import Entry, locked, parsed_size, part_of, surplus
from baton.cli.cache import shown
from baton.cli.main import main
from baton.errors import InputError

HOLDS = """
import sys
from pathlib import Path
from baton.cache import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for room in cache.ROOMS:
        cache.cache_folder(room)
    return tmp_path / "baton"


def write(path: Path, size: int, used: float) -> Path:
    path.write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


@contextmanager
def held_by_another(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process holds the lock of this file until the end of the block, or until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other


def names(home: Path) -> set[str]:
    return {path.name for room in cache.ROOMS for path in (home / room).iterdir()}


def folder(home: Path, room: str, name: str, size: int, unused_s: float) -> Path:
    """A folder of two files that was used so long ago."""
    made = cache.kept_folder(room, name, partial(fill, size=size))
    then = time.time() - unused_s
    os.utime(made, (then, then))
    return made


def fill(part: Path, size: int) -> None:
    (part / "tokenizer.json").write_bytes(b"x" * (size - 1))
    (part / "config.json").write_bytes(b"x")


def test_the_least_recently_used_go_and_no_more_than_needed() -> None:
    found = [Entry(Path(f"{i}.so"), 100, float(i)) for i in (3, 1, 2, 0)]
    assert [each.path.name for each in surplus(found, 250, ())] == ["0.so", "1.so"]
    assert surplus(found, 400, ()) == []
    assert [each.path.name for each in surplus(found, 250, {Path("0.so")})] == ["1.so", "2.so"]
    assert len(surplus(found, 0, {Path("3.so")})) == 3


def test_programs_libraries_and_parts_share_one_limit(home: Path) -> None:
    write(home / "native" / "rows-1.o", 100, 1)
    write(home / "native" / "program-2.so", 100, 2)
    write(home / "programs" / "gpt2-3.program", 100, 3)
    newest = write(home / "programs" / "gpt2-4.program", 500, 0)
    cache.set_limit(650)
    cache.keep_within_limit(newest)
    assert names(home) == {"gpt2-3.program", "gpt2-4.program"}


def test_folders_share_it_and_stay_for_an_hour_after_their_last_use(home: Path) -> None:
    write(home / "programs" / "gpt2-1.program", 100, time.time())
    for number, room in enumerate((cache.GGUF, cache.TOKENIZERS, cache.GGUF)):
        folder(home, room, f"{number:032x}", 100, cache.UNUSED_S + 60 - number)
    read = folder(home, cache.TOKENIZERS, "f" * 32, 100, cache.UNUSED_S - 60)
    cache.set_limit(250)
    cache.keep_within_limit()
    assert names(home) == {"gpt2-1.program", read.name}
    cache.set_limit(0)
    cache.keep_within_limit()
    assert names(home) == {read.name}
    assert [each.path for each in cache.clear()] == [read]
    assert names(home) == set()


def test_what_is_used_between_its_listing_and_its_deletion_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, renewed, idle = (
        folder(home, cache.GGUF, name, 100, 2 * cache.UNUSED_S) for name in ("ab", "cd", "ef")
    )

    def meanwhile() -> int:
        """What others do after the listing."""
        cache.kept_folder(cache.GGUF, used.name, partial(fill, size=100))
        shutil.rmtree(renewed)
        renewed.mkdir()
        fill(renewed, 100)
        return 0

    monkeypatch.setattr(cache, "limit", meanwhile)
    cache.keep_within_limit()
    assert not idle.exists()
    assert names(home) == {used.name, renewed.name}
    assert len(list(used.iterdir())) == len(list(renewed.iterdir())) == 2
    assert len(cache.clear()) == 2
    assert names(home) == set()


def test_a_folder_is_made_once_and_using_it_keeps_it(home: Path) -> None:
    calls: list[Path] = []

    def make(part: Path) -> None:
        calls.append(part)
        fill(part, 100)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: cache.kept_folder(cache.GGUF, "ab", make), range(8)))
    assert (found, len(calls)) == ({home / "gguf" / "ab"}, 1)
    os.utime(home / "gguf" / "ab", (1, 1))
    other = cache.kept_folder(cache.TOKENIZERS, "cd", make)
    os.utime(other, (2, 2))
    cache.kept_folder(cache.GGUF, "ab", make)
    assert len(calls) == 2
    assert [each.name for each in cache.entries()] == ["ab", "cd"]
    assert [each.size for each in cache.entries()] == [100, 100]


def test_a_folder_that_could_not_be_made_leaves_nothing(home: Path) -> None:
    def broken(part: Path) -> None:
        fill(part, 100)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.kept_folder(cache.GGUF, "ab", broken)
    assert names(home) == set()
    with pytest.raises(FileNotFoundError):
        cache.kept_folder(cache.GGUF, "ab", lambda part: (part / "no" / "file").touch())


def test_a_folder_is_found_where_nothing_can_be_written(home: Path) -> None:
    """As on a read-only disk: no lock can be had."""
    made = folder(home, cache.TOKENIZERS, "ab", 100, 0)
    (home / "tokenizers" / "ab.lock").mkdir()
    assert cache.kept_folder(cache.TOKENIZERS, "ab", partial(fill, size=1)) == made
    (home / "tokenizers" / "cd.lock").mkdir()
    with pytest.raises(IsADirectoryError):
        cache.kept_folder(cache.TOKENIZERS, "cd", partial(fill, size=1))


def test_what_another_process_opens_or_makes_is_not_deleted(home: Path) -> None:
    busy = write(home / "programs" / "busy-1.program", 100, 1)
    growing = home / "native" / "rows-2.o"
    part_of(growing).write_bytes(b"half")
    with held_by_another(busy), held_by_another(growing):
        assert cache.clear() == []
        assert names(home) == {
            "busy-1.program", "busy-1.program.lock", "rows-2.o.part", "rows-2.o.lock",
        }  # fmt: skip
    assert [each.path for each in cache.clear()] == [busy]
    assert names(home) == set()


@pytest.mark.parametrize("name", ["programs/gpt2-1.program", "gguf/ab", "tokenizers/cd"])
def test_what_a_killed_process_has_left_is_swept(home: Path, name: str) -> None:
    path = home / name
    with held_by_another(path) as other:
        if path.suffix:
            part_of(path).write_bytes(b"half")
        else:
            part_of(path).mkdir()
            fill(part_of(path), 100)
        assert cache.sweep() == 0
        other.kill()
        other.wait()
    assert cache.sweep() == 2
    assert names(home) == set()


@pytest.mark.parametrize(
    "name", ["program-ab12.77.tmp", "program-ab12.lock", "tmpk3_x.part", "ab12.lock"]
)
def test_leftovers_of_earlier_versions_go_once_nobody_can_be_writing_them(
    home: Path, name: str
) -> None:
    path = home / "native" / name
    path.touch()
    assert cache.sweep() == 0
    old = path.stat().st_mtime - cache.FORGOTTEN_S - 1
    os.utime(path, (old, old))
    assert cache.sweep() == 1
    assert names(home) == set()


def test_a_lock_is_one_persons_although_its_file_comes_and_goes(home: Path) -> None:
    path, inside = home / "native" / "rows-1.o", []

    def work(_: int) -> None:
        for _ in range(50):
            with locked(path):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()
            cache.sweep()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert names(home) == set()


@pytest.mark.parametrize(
    ("text", "size"),
    [("20G", 20e9), ("20 GB", 20e9), ("1.5t", 1.5e12), ("2GiB", 2 << 30), ("64 KiB", 65536),
     ("1000", 1000), ("0", 0), ("5B", 5)],
)  # fmt: skip
def test_sizes(text: str, size: float) -> None:
    assert parsed_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "20 G G", "1e9", "G", "5 iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="such as 20G, got"):
        parsed_size(text)


def test_the_command_shows_limits_and_clears(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home / "programs" / "gpt2-float32-float32-77.program", 19_000_000, 1)
    write(home / "native" / "program-float32-88.so", 200_000, 2)
    folder(home, cache.GGUF, "ab12", 50_000, 2 * cache.UNUSED_S)
    assert main(["cache"]) == 0
    said = capsys.readouterr().out
    assert "model gpt2-float32-float32" in said
    assert "library program-float32" in said
    assert "tokenizer ab12" in said
    assert "19.2 MB of at most 4.0 GB in" in said
    assert main(["cache", "--limit", "1MB"]) == 0
    said = capsys.readouterr().out
    assert "gpt2" not in said
    assert "250.0 kB of at most 1.0 MB in" in said
    cache.kept_folder(cache.GGUF, "ab12", partial(fill, size=1))
    assert main(["cache", "--limit", "1kB"]) == 0
    said = capsys.readouterr().out
    assert "50.0 kB of at most 1.0 kB in" in said
    assert "; what was used last stays" in said
    assert main(["cache", "--limit", "1MB"]) == 0
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.endswith("1 files deleted, 50.0 kB\n")
    assert main(["cache"]) == 0
    assert "0 B of at most 1.0 MB in" in capsys.readouterr().out


def test_a_cache_that_is_not_there_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    assert main(["cache"]) == 0
    assert "0 B of at most 4.0 GB" in capsys.readouterr().out
    assert main(["cache", "--limit", "lots"]) == InputError.exit_code
    assert "such as 20G, got 'lots'" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_ages_are_readable() -> None:
    found = [Entry(Path("a-1.so"), 5, now) for now in (1e6, 1e6 - 90, 1e6 - 9000, 1e6 - 3e5)]
    said = shown(found, 10, 1e6)
    for age in ("0 ago", "90.0 s ago", "2 hours ago", "3 days ago"):
        assert age in said
