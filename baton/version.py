"""The version of this clone."""

import tomllib
from pathlib import Path

PROJECT_FILE = Path(__file__).resolve().parent.parent / "pyproject.toml"


def own_version() -> str:
    """As pyproject.toml says."""
    try:
        return str(tomllib.loads(PROJECT_FILE.read_text())["project"]["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown"
