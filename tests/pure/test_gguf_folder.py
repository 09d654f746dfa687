"""The files made from a GGUF file: written once, whole, by whoever comes first; few are kept."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.errors import ModelError
from baton.gguf.folder import MOST, UNUSED_S, prepared_folder
from baton.package import ROOT
from tests.pure.gguf_bytes import gguf, write

NAMES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baton" / "gguf"


def kept(cache: Path) -> set[str]:
    return {each.name for each in cache.iterdir()} - {"lock"}


def aged(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_all_who_come_at_once_find_one_whole_folder(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "model.gguf", gguf())
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(prepared_folder, [path] * 8))
    (only,) = found
    assert kept(cache) == {only[1]}
    assert sorted(each.name for each in only[0].iterdir()) == NAMES


def test_another_process_finds_the_same(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "model.gguf", gguf())
    code = "import sys, baton.model_files as m; print(m.resolve_model(sys.argv[1]).fingerprint)"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, fingerprint = prepared_folder(path)
    assert ran.stdout.strip() == fingerprint == folder.name
    assert kept(cache) == {folder.name}


def test_a_changed_file_and_a_changed_end_have_other_fingerprints(
    tmp_path: Path, cache: Path
) -> None:
    made = gguf()
    path = write(tmp_path / "model.gguf", made)
    first = prepared_folder(path)
    write(path, made[:-1] + b"\x01")
    second = prepared_folder(path)
    assert first[1] != second[1]
    assert prepared_folder(write(tmp_path / "copy.gguf", made)) == first


def test_few_are_kept_and_none_that_may_be_in_use(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    names = [f"{number:032x}" for number in range(MOST + 8)]
    for age, name in enumerate(names):
        (cache / name).mkdir()
        aged(cache / name, UNUSED_S + 60 + age)
    for name in ("new", "interrupted.part"):
        (cache / name).mkdir()
    folder, _ = prepared_folder(write(tmp_path / "model.gguf", gguf()))
    assert kept(cache) == {"new", folder.name, *names[: MOST - 2]}
    for name in names:
        (cache / name).mkdir(exist_ok=True)
        aged(cache / name, UNUSED_S - 60)
    newest, _ = prepared_folder(write(tmp_path / "other.gguf", gguf({"general.name": "x"})))
    assert kept(cache) == {"new", folder.name, newest.name, *names}


def test_a_refused_model_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError):
        prepared_folder(write(tmp_path / "model.gguf", gguf({"tokenizer.ggml.pre": "new"})))
    assert kept(cache) == set()


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"cannot be stored: .*; set XDG_CACHE_HOME to a folder"):
        prepared_folder(write(tmp_path / "model.gguf", gguf()))
