"""The files made from a GGUF file: written once, whole, by whoever comes first."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.cli.main import main
from baton.errors import ModelError
from baton.gguf.folder import prepared_folder
from baton.package import ROOT
from tests.pure.gguf_bytes import gguf, write

NAMES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baton" / "gguf"


def kept(cache: Path) -> set[str]:
    return {each.name for each in cache.iterdir()}


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


def test_the_command_covers_it_and_what_is_deleted_is_made_again(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "model.gguf", gguf())
    folder, fingerprint = prepared_folder(path)
    assert main(["cache"]) == 0
    assert f"tokenizer {fingerprint}" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert kept(cache) == set()
    assert prepared_folder(path) == (folder, fingerprint)
    assert kept(cache) == {fingerprint}


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
