"""Environment: the facts at the head of a report. `place` is the same for all runs on one machine,
`moment` differs."""

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
from tools.lab.phrasing import number

PACKAGES = ("torch", "transformers", "numpy", "pyzmq")
GIB = 2**30


def place(dtype: str) -> Mapping[str, str]:
    """Machine, memory, cores, device, the dtype in use, versions."""
    device = pick_device("auto")
    chosen = chosen_dtype(dtype)
    how = " (chosen)" if dtype == "auto" else " (asked for)"
    facts = {
        "machine": str(this_machine()),
        "memory": f"{number(total_memory() / GIB)} GiB",
        "device": f"{device}: {describe_device(device)}",
        "workers": str(plan_topology(gpus=count_gpus())),
        "dtype": chosen + how,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "baton": own_version(),
    }
    return facts | {name: _version(name) for name in PACKAGES}


def chosen_dtype(asked: str) -> str:
    """The dtype in use; "auto" resolved for this machine."""
    return asked if asked in WEIGHT_DTYPES else dtype_name(pick_dtype(asked, pick_device("auto")))


def moment(command: str) -> Mapping[str, str]:
    """Date, commit, command, free memory."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": command,
        "free memory": f"{number(free_memory(pick_device('auto')) / GIB)} GiB",
    }


def commit() -> str:
    """The commit of the checkout, and whether files differ from it."""
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
