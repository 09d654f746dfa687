"""Native code is built once for all, is never stale, and where it cannot be had torch takes over."""

import logging
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.cache import cache_folder
from baton.engine.cpu import kernel
from baton.engine.cpu.build import BuildFailed, NoCompiler, build, find_compiler
from baton.engine.gather import GatherAttention
from tests.patience import PATIENCE_MS

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a source that compiles in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BATON_NATIVE", raising=False)
    native = tmp_path / "native"
    native.mkdir()
    (native / "answer.cpp").write_text('#include "answer.h"\n' + SOURCE)
    (native / "answer.h").write_text("#define ANSWER 41\n")
    monkeypatch.setattr("baton.engine.cpu.build.NATIVE", native)
    return tmp_path


@pytest.fixture
def counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler, writing a line for each source that it compiles."""
    try:
        compiler = find_compiler()
    except NoCompiler as why:
        pytest.skip(str(why))
    times = place / "times"
    times.touch()
    script(
        place, f'case "$*" in *" -c "*) echo once >> {times};; esac\nexec {" ".join(compiler)} "$@"'
    )
    monkeypatch.setenv("CXX", str(place / "cxx"))
    return times


def script(place: Path, body: str) -> None:
    path = place / "cxx"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)


def test_it_is_built_once_for_all_who_ask_at_once(counted: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: build(["answer.cpp"], "answer"), range(4)))
    assert [each.answer() for each in libraries] == [41] * 4
    assert counted.read_text() == "once\n"
    folder = counted.parent / "cache" / "baton" / "native"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.suffix for path in folder.iterdir()) == [".o", ".so"]


def test_a_changed_header_is_built_anew(counted: Path) -> None:
    assert build(["answer.cpp"], "answer").answer() == 41
    (counted.parent / "native" / "answer.h").write_text("#define ANSWER 42\n")
    assert build(["answer.cpp"], "answer").answer() == 42


def test_another_library_takes_the_parts_that_are_there(counted: Path) -> None:
    (counted.parent / "native" / "more.cpp").write_text('extern "C" int more() { return 1; }')
    build(["answer.cpp"], "answer")
    library = build(["answer.cpp", "more.cpp"], "both")
    assert (library.answer(), library.more()) == (41, 1)
    assert counted.read_text() == "once\n" * 2


def test_the_folder_of_the_sources_does_not_matter(
    counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every clone has its own."""
    build(["answer.cpp"], "answer")
    (counted.parent / "native").rename(counted.parent / "clone")
    monkeypatch.setattr("baton.engine.cpu.build.NATIVE", counted.parent / "clone")
    assert build(["answer.cpp"], "answer").answer() == 41
    assert counted.read_text() == "once\n"


def test_a_build_that_failed_goes_on_where_it_was(counted: Path) -> None:
    broken = counted.parent / "native" / "more.cpp"
    broken.write_text("#error not yet")
    with pytest.raises(BuildFailed, match="not yet"):
        build(["answer.cpp", "more.cpp"], "both")
    broken.write_text('extern "C" int more() { return 1; }')
    assert build(["answer.cpp", "more.cpp"], "both").answer() == 41
    assert counted.read_text() == "once\n" * 3  # answer.cpp, and more.cpp twice


ENDLESS = """
import sys
from pathlib import Path
from baton.engine.cpu import build
build.NATIVE = Path(sys.argv[1])
build.build(["endless.cpp"], "endless")
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_compiler_ends_with_its_parent(counted: Path, end: signal.Signals) -> None:
    """However that ends. The compiler reads a source from a pipe, so it runs until it is killed."""
    native = counted.parent / "native"
    os.mkfifo(native / "endless.inc")
    (native / "endless.cpp").write_text('#include "endless.inc"\n')
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(native)],
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    ) as parent:
        source = os.open(native / "endless.inc", os.O_WRONLY)  # waits for the compiler to open it
        parent.send_signal(end)
        parent.wait()
        waiting = select.poll()
        waiting.register(source, 0)  # an error is reported always: nobody reads any more
        assert waiting.poll(PATIENCE_MS) == [(source, select.POLLERR)]
        os.close(source)
    assert counted.read_text() == "once\n"
    (native / "endless.cpp").write_text('extern "C" int endless() { return 3; }')
    (native / "endless.inc").unlink()
    assert build(["endless.cpp"], "endless").endless() == 3
    assert {path.suffix for path in cache_folder("native").iterdir()} == {".o", ".so"}


def test_compiling_is_said_once(counted: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(["answer.cpp"], "answer")
    assert [text.partition(":")[0] for text in caplog.messages] == [
        "compiling for this CPU, once", "compiled for this CPU",
    ]  # fmt: skip
    build(["answer.cpp"], "answer")
    assert len(caplog.messages) == 2


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompiler, match="install g"):
        build(["answer.cpp"], "answer")


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(NoCompiler, match="CXX=no-such-compiler"):
        build(["answer.cpp"], "answer")


def test_a_compiler_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(BuildFailed, match="/bin/false failed"):
        build(["answer.cpp"], "answer")


@pytest.mark.parametrize("flag", ["-march=x86-64-v3", "-mcpu=neoverse-n1", "-m64"])
def test_a_target_that_cxx_names_replaces_this_cpu(
    flag: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(place, f'echo "$@" >> {place / "arguments"}')  # a compiler that makes nothing
    monkeypatch.setenv("CXX", f"{place / 'cxx'} {flag}")
    with pytest.raises(BuildFailed, match="cannot be stored"):
        build(["answer.cpp"], "answer")
    version, command, *_ = (place / "arguments").read_text().splitlines()
    assert version.split() == [flag, "--version"]
    targets = [word for word in command.split() if word.startswith(("-march=", "-mcpu="))]
    assert targets == [flag] if flag != "-m64" else targets in (["-march=native"], ["-mcpu=native"])


def test_a_compiler_that_does_not_take_it(counted: Path) -> None:
    (counted.parent / "native" / "answer.h").write_text("#error too old\n")
    with pytest.raises(BuildFailed, match="too old"):
        build(["answer.cpp"], "answer")
    assert not list((counted.parent / "cache").rglob("*.so"))


def test_a_library_that_cannot_be_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(place, 'for last; do :; done; [ "$1" = --version ] || echo junk > "$last"')
    monkeypatch.setenv("CXX", str(place / "cxx"))
    with pytest.raises(BuildFailed, match="XDG_CACHE_HOME"):
        build(["answer.cpp"], "answer")


def test_a_folder_that_others_can_write_is_not_trusted(counted: Path) -> None:
    folder = counted.parent / "cache" / "baton" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(BuildFailed, match="writable by other users"):
        build(["answer.cpp"], "answer")


@pytest.mark.parametrize(("name", "value"), [("BATON_NATIVE", "0"), ("CXX", "/bin/false")])
def test_torch_takes_over_and_the_log_says_why(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    kernel.library.cache_clear()
    kernel.cpu_attention.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert kernel.cpu_attention() is GatherAttention
            assert kernel.cpu_attention() is GatherAttention
    finally:
        kernel.library.cache_clear()
        kernel.cpu_attention.cache_clear()
    (line,) = caplog.messages
    assert name in line
