"""This package: where it lies, what its command is called, its version."""

import os
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
"""The checkout, or site-packages. Child processes start here, so that `python -m router` is this one."""

IN_CHECKOUT = all((ROOT / name).is_file() for name in ("pyproject.toml", "main.py"))
COMMAND = "python main.py" if IN_CHECKOUT else "baton"
INSTALLED = {
    "python main.py": "baton",
    "python -m server": "baton http",
    "python -m router": "baton router",
    "python -m prefill_worker": "baton prefill-worker",
    "python -m decode_worker": "baton decode-worker",
    "configs/model_paths.yaml": "~/.config/baton/model_paths.yaml",
}
"""What a checkout calls a thing, and what it is called where the package is installed."""


def spelled(text: str) -> str:
    """A text for users with the names that work here; texts are written with those of a checkout."""
    if not IN_CHECKOUT:
        for written, installed in INSTALLED.items():
            text = text.replace(written, installed)
    return text


def config_folder() -> Path:
    """Where the user's own settings are read: configs/ of a checkout; beside an installed package
    $XDG_CONFIG_HOME/baton, or ~/.config/baton."""
    if IN_CHECKOUT:
        return ROOT / "configs"
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "baton"


def own_version() -> str:
    """The version in pyproject.toml in a checkout, else that of the installed package."""
    try:
        if IN_CHECKOUT:
            text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            return str(tomllib.loads(text)["project"]["version"])
        return version("baton")
    except (OSError, KeyError, tomllib.TOMLDecodeError, PackageNotFoundError):
        return "unknown"
