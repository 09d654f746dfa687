"""Which shipped library is used: the best for this CPU, and only the one that was shipped."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest

from baton.engine.cpu import shipped
from baton.engine.cpu.ship import wanted_targets
from baton.engine.cpu.shipped import V3, V4, Shipped, choose, digest_of, sources_digest
from baton.errors import InputError

LISTED = [
    Shipped(library, target, machine, needs, "")
    for library in ("program", "kernel")
    for target, machine, needs in (
        ("x86-64-v3", "x86_64", V3),
        ("x86-64-v4-vnni", "x86_64", (*V4, "avx512_vnni")),
        ("x86-64-v4", "x86_64", V4),
        ("arm64", "aarch64", ("asimd",)),
    )
]


@pytest.mark.parametrize(
    ("machine", "features", "target"),
    [
        ("x86_64", {*V3, "sse2"}, "x86-64-v3"),
        ("x86_64", {*V4, "amx_tile"}, "x86-64-v4"),
        ("x86_64", {*V4, "avx512_vnni", "avx512_bf16"}, "x86-64-v4-vnni"),
        ("x86_64", {*V3} - {"fma"}, None),
        ("x86_64", {"sse2", "avx"}, None),
        ("x86_64", set(), None),
        ("aarch64", {"asimd", "sve"}, "arm64"),
        ("aarch64", {*V4}, None),
        ("riscv64", {*V4, "asimd"}, None),
    ],
)
def test_the_best_that_this_cpu_can_run(
    machine: str, features: set[str], target: str | None
) -> None:
    for library in ("program", "kernel"):
        found = choose(LISTED, library, machine, features)
        assert (found and (found.library, found.target)) == (target and (library, target))
    assert choose(LISTED, "test", machine, features) is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships one library, which every CPU can run."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    (tmp_path / "program.any.so").write_bytes(b"code")
    listed = Shipped(
        "program", "any", platform.machine(), (), digest_of(tmp_path / "program.any.so")
    )
    about = {"sources": sources_digest(), "libraries": [asdict(listed)]}
    (tmp_path / shipped.MANIFEST).write_text(json.dumps(about))
    return tmp_path


def test_what_was_shipped_is_used(folder: Path) -> None:
    assert shipped.shipped_library("program") == folder / "program.any.so"
    assert shipped.shipped_library("kernel") is None


def test_a_compiler_of_the_users_choice_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++ -march=x86-64-v2")
    assert shipped.shipped_library("program") is None


def test_a_changed_library_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "program.any.so").write_bytes(b"cod\0")
    assert shipped.shipped_library("program") is None
    assert "program.any.so is not the one that was shipped" in caplog.text


def test_a_library_of_other_sources_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = folder / "native"
    changed.mkdir()
    (changed / "program.cpp").touch()
    monkeypatch.setattr(shipped, "NATIVE", changed)
    assert shipped.shipped_library("program") is None
    assert "made from other sources" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sources": 1, "libraries": [{"library": 1}]}'])
def test_a_damaged_manifest_is_said(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / shipped.MANIFEST).write_text(text)
    assert shipped.shipped_library("program") is None
    assert "the shipped libraries are not used" in caplog.text


def test_a_missing_library_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "program.any.so").unlink()
    assert shipped.shipped_library("program") is None
    assert "program.any.so" in caplog.text


def test_targets_of_a_wheel() -> None:
    assert wanted_targets("none", "x86_64") == []
    assert {each.machine for each in wanted_targets(None, "x86_64")} >= {"x86_64"}
    assert [each.name for each in wanted_targets("arm64,x86-64-v3", "x86_64")] == [
        "arm64", "x86-64-v3",
    ]  # fmt: skip
    with pytest.raises(InputError, match="names x86-64-v9; known are x86-64-v3"):
        wanted_targets("x86-64-v9", "x86_64")
