"""`python main.py doctor`: the facts that a bug report needs, as one block of text."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import yaml

from baton.errors import ModelError
from baton.machine import this_machine
from baton.model_files import BUNDLED, PATHS_FILE, SHAPES, resolve_model
from baton.package import IN_CHECKOUT, ROOT, own_version
from baton.table import amount

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy"),
    *("pyzmq", "msgpack", "click", "tqdm", "PyYAML", "pytest"),
)
COMPILERS = ("c++", "g++", "clang++")
PORT = 8000
TORCH_S = 60  # loading torch from a cold disk

# Runs in a child process: torch takes a second to load, and a broken torch must not break this command.
ASK_TORCH = (
    "import torch; from baton.engine.device import describe_device, pick_device;"
    "n = torch.cuda.device_count(); print('torch built for CUDA', torch.version.cuda);"
    "[print(d, describe_device(pick_device(d))) for d in ['cpu', *(f'cuda:{i}' for i in range(n))]];"
    "print('auto is', pick_device('auto'))"
)


def examine() -> str:
    """The report. It contains no user name, host name or key."""
    facts = [
        ("baton", f"{own_version()}{_commit()}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        ("machine", str(this_machine())),
        *(("device", line) for line in _devices()),
        ("/dev/shm", _shared_memory()),
        ("open files", "at most {} (hard limit {})".format(*map(_limit, _file_limits()))),
        ("compiler", next(filter(None, map(shutil.which, COMPILERS)), "none: slower attention")),
        ("permissions", ", ".join(_permissions())),
        ("port", _port()),
        *(("model", line) for line in _models()),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in facts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    if not IN_CHECKOUT:  # site-packages may lie inside another repository
        return ""
    lines = _output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], timeout_s=5)
    return f" ({lines[0]})" if lines else ""


def _devices() -> list[str]:
    lines = _output_of([sys.executable, "-c", ASK_TORCH], timeout_s=TORCH_S)
    return lines or ["torch does not start: run `python -c 'import torch'` to see why"]


def _output_of(command: list[str], *, timeout_s: float) -> list[str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "not there"
    return f"{amount(usage.free)} of {amount(usage.total)} free"


def _file_limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _permissions() -> list[str]:
    found = []
    for name, attempt in (("memfd", _try_memfd), ("passing descriptors", _try_passing)):
        try:
            attempt()
            found.append(f"{name} works")
        except (OSError, AttributeError) as error:
            found.append(f"{name} refused ({error})")
    return found


def _try_memfd() -> None:
    os.close(os.memfd_create("baton-doctor"))


def _try_passing() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        socket.send_fds(here, [b"x"], [0])
        _, descriptors, _, _ = socket.recv_fds(there, 1, 1)
        for descriptor in descriptors:
            os.close(descriptor)


def _port() -> str:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError as error:
            return f"{PORT} is taken ({error.strerror})"
    return f"{PORT} is free"


def _models() -> list[str]:
    lines = []
    for name in _listed():
        try:
            files = resolve_model(name)
            lines.append(f"{name}: {files.architecture}, context {files.max_positions:,}")
        except ModelError as error:
            lines.append(f"{name}: {error}")
    shapes = ", ".join(path.stem for path in sorted(SHAPES.glob("*.json")))
    return [*lines, f"shapes with made-up weights: {shapes or 'none'}"]


def _listed() -> list[str]:
    try:
        listed = yaml.safe_load(PATHS_FILE.read_text()) or {}
    except (OSError, yaml.YAMLError):
        listed = {}
    return [str(name) for name in {**BUNDLED, **listed}]
