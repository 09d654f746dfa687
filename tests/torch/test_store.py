"""Compiled models on disk: made once, whole or not at all, never in the way."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from baton.cache import cache_folder, set_limit
from baton.engine.boot import boot
from baton.engine.cpu import store
from baton.model_files import ModelFiles, resolve_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "baton" / "programs"


@pytest.fixture
def demo() -> ModelFiles:
    return resolve_model("demo")


def maker(data: bytes, calls: list[bytes]) -> Callable[[BinaryIO], None]:
    def make(file: BinaryIO) -> None:
        calls.append(data)
        file.write(data)
        file.flush()

    return make


def read(file: BinaryIO) -> bytes:
    with file:
        file.seek(0)
        return file.read()


def test_it_is_made_once(home: Path) -> None:
    calls: list[bytes] = []
    for _ in range(3):
        assert read(store.opened("k", maker(b"abc", calls), 3)) == b"abc"
    assert calls == [b"abc"]
    assert [path.name for path in home.glob("*.program")] == ["k.program"]
    assert home.stat().st_mode & 0o077 == 0


def test_who_comes_meanwhile_waits_for_the_one_that_makes_it(home: Path) -> None:
    calls: list[bytes] = []
    with ThreadPoolExecutor(8) as pool:
        opened = [pool.submit(store.opened, "k", maker(b"abc", calls), 3) for _ in range(8)]
        assert {read(each.result()) for each in opened} == {b"abc"}
    assert calls == [b"abc"]


def test_what_could_not_be_made_leaves_nothing(home: Path) -> None:
    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.opened("k", broken, 3)
    assert not list(home.iterdir())
    assert read(store.opened("k", maker(b"abc", []), 3)) == b"abc"


def test_the_longest_unused_go_when_they_are_too_many(
    home: Path,
) -> None:
    for i, key in enumerate("abc"):
        store.opened(key, maker(b"x" * 100, []), 100).close()
        os.utime(home / f"{key}.program", (i, i))
    store.opened("a", maker(b"", []), 100).close()  # used again
    os.utime(home / "a.program", (9, 9))
    set_limit(250)
    store.opened("d", maker(b"x" * 100, []), 100).close()
    assert sorted(path.stem for path in home.glob("*.program")) == ["a", "d"]


@pytest.mark.parametrize("why", ["no room", "no folder"])
def test_without_a_place_it_is_kept_in_memory_and_said(
    home: Path, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if why == "no folder":
        home.parent.parent.joinpath("baton").write_text("in the way")
    size = 1 << 60 if why == "no room" else 3
    with caplog.at_level(logging.WARNING):
        assert read(store.opened("k", maker(b"abc", []), size)) == b"abc"
    assert "not stored" in caplog.text
    assert not home.is_dir() or not list(home.glob("*.program"))


def test_keys_tell_models_and_dtypes_apart(demo: ModelFiles) -> None:
    key = store.key_of(demo, "float32")
    assert key == store.key_of(demo, "float32")
    assert key != store.key_of(demo, "bfloat16")
    assert key != store.key_of(replace(demo, fingerprint="other"), "float32")
    assert key != store.key_of(resolve_model("random:gpt2"), "float32")


def test_a_copy_of_a_model_has_the_same_key_and_a_changed_one_another(
    demo: ModelFiles, tmp_path: Path
) -> None:
    """Every clone has its own copy of the bundled model, checked out at another time."""
    assert demo.folder is not None
    copy = shutil.copytree(demo.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    (weights,) = copy.glob("*.safetensors")
    os.utime(weights, (1, 1))
    key = store.key_of(replace(demo, folder=copy, weights=(weights,)), "float32")
    assert key == store.key_of(demo, "float32")
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert key != store.key_of(replace(demo, folder=copy, weights=(weights,)), "float32")


@pytest.fixture(scope="module")
def home_with_native_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the compiler makes is not made anew: that takes longer than everything else here. Each test
    leaves the compiled model whole, so that the next one finds it."""
    home = tmp_path_factory.mktemp("home")
    (home / "baton").mkdir(mode=0o700)
    (home / "baton" / "native").symlink_to(cache_folder("native").resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home / "baton" / "programs"


@pytest.mark.parametrize("size", [0, 10, 5000])
@pytest.mark.usefixtures("native")
def test_a_file_that_was_cut_short_is_made_anew(
    home_with_native_code: Path, demo: ModelFiles, size: int
) -> None:
    def compiled() -> str:
        return boot(demo, device="cpu", dtype="float32", block_size=16).runner.backend

    assert compiled() == "compiled for this CPU"
    (path,) = home_with_native_code.glob("*.program")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:size])
    assert compiled() == "compiled for this CPU"
    assert path.stat().st_size == whole


@pytest.mark.usefixtures("native")
def test_a_file_with_a_damaged_head_is_made_anew(
    home_with_native_code: Path, demo: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled() -> str:
        return boot(demo, device="cpu", dtype="float32", block_size=16).runner.backend

    assert compiled() == "compiled for this CPU"
    (path,) = home_with_native_code.glob("*.program")
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    assert compiled() == "compiled for this CPU"
    assert "is damaged and is compiled again" in caplog.text
    assert path.read_bytes() == whole
