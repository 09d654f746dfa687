"""Environment: what a report says before its first number. `place` is the same from run to run on one
machine, `moment` is not."""

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from baton.dtypes import WEIGHT_DTYPES
from baton.engine.device import (
    describe_device,
    dtype_name,
    free_memory,
    pick_device,
    pick_dtype,
    total_memory,
)
from baton.machine import this_machine
from baton.package import ROOT, own_version
from baton.topology import count_gpus, plan_topology

PACKAGES = ("torch", "transformers", "numpy", "pyzmq")
GIB = 2**30


def place(dtype: str) -> Mapping[str, str]:
    """Machine, memory, cores, the device and dtype that "auto" stands for, versions."""
    device = pick_device("auto")
    chosen = chosen_dtype(dtype)
    how = " (chosen)" if dtype == "auto" else " (asked for)"
    facts = {
        "machine": str(this_machine()),
        "memory": f"{total_memory() / GIB:.1f} GiB",
        "device": f"{device}: {describe_device(device)}",
        "workers": str(plan_topology(gpus=count_gpus())),
        "dtype": chosen + how,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "baton": own_version(),
    }
    return facts | {name: _version(name) for name in PACKAGES}


def chosen_dtype(asked: str) -> str:
    """What "auto" stands for here."""
    return asked if asked in WEIGHT_DTYPES else dtype_name(pick_dtype(asked, pick_device("auto")))


def moment(command: str) -> Mapping[str, str]:
    """Date, commit, command, and the memory that was free."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": command,
        "free memory": f"{free_memory(pick_device('auto')) / GIB:.1f} GiB",
    }


def commit() -> str:
    """Of the clone, and whether files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown (no git here)"
    return head + (" with changes" if changed else "")


def _git(*words: str) -> str:
    ran = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True
    )
    return ran.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
