"""The installed package: built as `pip install .` builds it, put where no checkout is, and used.

The sdist is made from a copy of the checkout and the wheel from the sdist, so both are tested and
nothing is written into the checkout. The wheel is installed without an index and without its
dependencies: those are this environment's, reached through a .pth file.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from baton.engine.cpu.build import NoCompiler, find_compiler
from baton.engine.cpu.shipped import TARGETS, cpu_features
from baton.package import PACKAGE, ROOT
from tests.patience import PATIENCE_S

TOP_LEVEL = {"baton", "router", "prefill_worker", "decode_worker", "sampler", "prompts.py"}
COMMANDS = (
    "infer", "serve", "chat", "run-batch", "cache", "doctor", "bench", "eval", "router", "prefill-worker",
    "decode-worker", "http", "keys", "convert",
)  # fmt: skip
TOOLS = ("bench", "lab", "eval")
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "node_modules", "report", "runs"
)


def shipped_target() -> str:
    """The best target for this machine, or none: the tests make libraries for one."""
    try:
        find_compiler()
    except NoCompiler:
        return "none"
    here = [
        each
        for each in TARGETS
        if each.machine == platform.machine() and set(each.needs) <= cpu_features()
    ]
    return max(here, key=lambda each: len(each.needs)).name if here else "none"


TARGET = shipped_target()
LIBRARIES = {"manifest.json", f"program.{TARGET}.so", f"kernel.{TARGET}.so"}


def product_files(root: Path) -> set[str]:
    """Every file of the packages, which is what the wheel must hold."""
    found = {root / "prompts.py"}
    for package in TOP_LEVEL - {"prompts.py"}:
        found |= {path for path in (root / package).rglob("*") if path.is_file()}
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


def backend(folder: Path, step: str, out: Path) -> Path:
    """What setuptools' build backend makes of the project in this folder."""
    code = f"from setuptools import build_meta; print(build_meta.{step}({str(out)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, "BATON_WHEEL_TARGETS": TARGET},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return out / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_COPIED)
    sdist = backend(folder / "checkout", "build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return backend(folder / sdist.name.removesuffix(".tar.gz"), "build_wheel", folder)


class Installed:
    """A virtual environment that holds the wheel, and sees this one's packages behind it."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        environment = folder / "venv"
        venv.create(environment, symlinks=True)
        (site,) = (environment / "lib").glob("python*/site-packages")
        installed = subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-index",
             "--no-deps", "--prefix", str(environment), str(wheel)],
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert installed.returncode == 0, installed.stderr
        (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        self.site, self.python = site, environment / "bin" / "python"
        self.baton = environment / "bin" / "baton"
        # pip wrote its own interpreter into the script: this environment's has to run it.
        lines = self.baton.read_text().splitlines(keepends=True)
        self.baton.write_text("".join([f"#!{self.python}\n", *lines[1:]]))

    def run(self, *arguments: str, code: int = 0, **more: str) -> str:
        """`baton` from an empty folder, with `more` environment; what it says, on both streams."""
        hidden = {"PYTHONPATH", "PYTHONHOME", "XDG_CONFIG_HOME"}
        ran = subprocess.run(
            [self.baton, *arguments],
            cwd=self.home,
            env={**{k: v for k, v in os.environ.items() if k not in hidden}, "HOME": str(self.home),
                 **more},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert ran.returncode == code, ran.stdout
        return ran.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == TOP_LEVEL
    shipped = LIBRARIES if TARGET != "none" else set()
    assert names == product_files(ROOT) | {f"baton/engine/cpu/shipped/{each}" for each in shipped}


def test_the_wheel_holds_what_is_read_at_run_time(wheel: Path) -> None:
    """By name, in case the folders themselves are moved."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= {
        "baton/py.typed",
        "baton/models/demo/model.safetensors",
        "baton/models/demo/tokenizer.json",
        "baton/configs/shapes/gpt2.json",
        "baton/engine/cpu/native/program.cpp",
        "baton/server/page/index.html",
    }


def test_the_package_comes_from_the_wheel_and_from_no_checkout(installed: Installed) -> None:
    code = (
        "import baton, baton.package as p, sys; print(p.PACKAGE, p.COMMAND, *sys.path, sep='\\n')"
    )
    out = subprocess.run(
        [installed.python, "-P", "-c", code], cwd=installed.home, capture_output=True, text=True,
        timeout=PATIENCE_S, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert out[:2] == [str(installed.site / "baton"), "baton"]
    assert str(PACKAGE) != out[0]
    assert str(ROOT) not in out[2:]


def test_the_main_job_from_an_empty_folder(installed: Installed) -> None:
    said = installed.run("-b", "4", "-l", "20", "-o", "out.txt")
    assert "main.py" not in said
    out = (installed.home / "out.txt").read_text()
    assert out.startswith("=== 1/8 ===\n")
    assert "=== 8/8 ===" in out


def test_every_help_is_spelled_as_it_is_typed(installed: Installed) -> None:
    for command in ((), *((each,) for each in COMMANDS if each not in TOOLS)):
        said = " ".join(installed.run(*command, "--help").split())
        assert said.startswith(" ".join(("Usage: baton", *command))), said
        assert "main.py" not in said
        assert "python -m" not in said


def test_what_belongs_to_the_checkout_says_so(installed: Installed) -> None:
    shown = installed.run("--help").partition("Commands:")[2].partition("Examples:")[0].split()
    for tool in TOOLS:
        assert tool not in shown
        said = installed.run(tool, *(["engine"] if tool == "bench" else []), code=2)
        assert said.count("\n") == 1, said
        assert "part of the source checkout" in said


def test_errors_and_keys_are_spelled_as_they_are_typed(installed: Installed) -> None:
    assert "See baton --help." in installed.run("--no-such-option", code=2)
    said = installed.run("keys", "keys")
    assert "baton prefill-worker --router" in said
    assert "python" not in said


def test_models_are_named_in_the_users_configuration_folder(installed: Installed) -> None:
    """With a folder relative to that file."""
    folder = name_a_model(installed)
    assert "my-model: GPT2LMHeadModel" in installed.run("doctor")
    assert "my-modle" in (said := installed.run("--model", "my-modle", code=3))
    assert "did you mean my-model? " in said
    assert str(folder / "model_paths.yaml") in said


def name_a_model(installed: Installed) -> Path:
    folder = installed.home / ".config" / "baton"
    shutil.copytree(PACKAGE / "models" / "demo", folder / "models" / "mine", dirs_exist_ok=True)
    (folder / "model_paths.yaml").write_text("my-model: models/mine\n")
    return folder


def test_a_named_model_goes_the_whole_way_and_needs_no_compiler(
    installed: Installed, tmp_path: Path
) -> None:
    """The router and the workers read its name, too. Where the wheel has a library for this CPU, nothing
    else is looked for."""
    name_a_model(installed)
    cache = tmp_path / "cache"
    alone = dict(PATH="/nowhere", CXX="") if TARGET != "none" else {}
    said = installed.run("--model", "my-model", "-l", "5", "-o", "named.txt",
                         XDG_CACHE_HOME=str(cache), **alone)  # fmt: skip
    assert "main.py" not in said
    assert (installed.home / "named.txt").exists()
    if alone:
        assert "compiled for this CPU" in said
        assert not (cache / "baton" / "native").exists()
