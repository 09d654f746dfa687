"""Golden files: what users see, recorded in tests/golden. A test computes it again and compares.

    BATON_UPDATE_GOLDENS=1 .venv/bin/python -m pytest tests/pure/test_golden_help.py

records it anew. Do this for intended additions, and read the diff before you commit it: users notice
every changed or removed line.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "golden"
UPDATING = bool(os.environ.get("BATON_UPDATE_GOLDENS"))
WIDTH = 100
SHOWN = 200  # characters of a value in a message
BEFORE = 60  # of them before the first difference of two long texts


def check(name: str, found: Any) -> None:
    """Compare with tests/golden/`name`, or record it there. Fails with one line for each difference."""
    if UPDATING:
        record(name, found)
        return
    wrong = list(differences(recorded(name), found, ""))
    assert not wrong, (
        f"{len(wrong)} differences from tests/golden/{name} (if they are meant: run this test with "
        "BATON_UPDATE_GOLDENS=1 and read the diff):\n" + "\n".join(wrong)
    )


def recorded(name: str) -> Any:
    """What the file holds; None if there is no such file."""
    file = FOLDER / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def record(name: str, found: Any) -> None:
    """Write the file."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text(_laid_out(found, "") + "\n", encoding="utf-8")


def differences(golden: Any, found: Any, where: str) -> Iterator[str]:
    """One line for each value that was removed, added or changed, with the path to it."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*golden, *found]):
            path = f"{where} > {key}" if where else key
            if key not in found:
                yield f"removed  {path}"
            elif key not in golden:
                yield f"new      {path}: {_short(found[key])}"
            else:
                yield from differences(golden[key], found[key], path)
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        for index, (old, new) in enumerate(zip(golden, found, strict=True)):
            yield from differences(old, new, f"{where}[{index}]")
    elif type(golden) is not type(found) or golden != found:
        start = _first_difference(golden, found)
        yield f"changed  {where}: {_short(golden, start)} -> {_short(found, start)}"


def _first_difference(one: Any, other: Any) -> int:
    """Where long texts begin to differ, less some context."""
    if not isinstance(one, str) or not isinstance(other, str) or len(one) <= SHOWN:
        return 0
    pairs = enumerate(zip(one, other, strict=False))
    differs = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    return max(0, differs - BEFORE)


def _short(value: Any, start: int = 0) -> str:
    text = json.dumps(value, ensure_ascii=False) if not start else "..." + value[start:]
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _laid_out(value: Any, indent: str) -> str:
    """JSON with one line for each value that fits in one: a file whose diffs can be read."""
    line = json.dumps(value, ensure_ascii=False)
    nested = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(each, str | dict | list) for each in value)
    )
    if not nested or not value or len(indent + line) <= WIDTH:
        return line
    deeper = indent + " "
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(k, ensure_ascii=False)}: {_laid_out(v, deeper)}" for k, v in value.items()
        ]
        opening, closing = "{}"
    else:
        parts = [_laid_out(each, deeper) for each in value]
        opening, closing = "[]"
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{closing}"
