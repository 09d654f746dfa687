"""Runs one study in a process of its own: its memory is its own, and a crash stops no other study.

python -m tools.lab.child NAME --parent PID  < setting.json      NAME.jsonl.part while it runs;
                                                                 NAME.jsonl and NAME.json at the end
"""

import json
import os
import signal
import sys
import time
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from baton.errors import BatonError
from baton.host import die_with
from tools.lab.environment import moment, place
from tools.lab.study import MODULES, Notebook, Saved, Setting, Study, save


def setting_from(raw: dict[str, Any]) -> Setting:
    """The parent's Setting, from JSON."""
    lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
    return Setting(**(raw | lists | {"output": Path(raw["output"])}))


def do(name: str, setting: Setting, command: str) -> Study:
    """Run the study and save it. If it does not finish, its lines stay in NAME.jsonl.part."""
    lines = setting.output / f"{name}.jsonl"
    part = lines.with_suffix(".jsonl.part")
    part.unlink(missing_ok=True)
    notebook = Notebook(part, lambda text: print(text, flush=True))
    where, when = place(setting.dtype), moment(command)
    notebook.record("environment", **where, **when)
    for key in ("machine", "device", "workers", "dtype"):
        notebook.say(f"{key:<9} {where[key]}")
    begun = time.monotonic()
    study: Study = import_module(MODULES[name]).run(setting, notebook)
    failures = tuple(dict.fromkeys([*study.failures, *notebook.failures]))
    study = replace(
        study, name=name, command=command, failures=failures, seconds=time.monotonic() - begun
    )
    os.replace(part, lines)
    save(setting.output, Saved(study, where, when))
    return study


def main() -> int:
    """Returns 0, or the exit code of the error, whose message is the last line on stderr."""
    name, _, parent = sys.argv[1:4]
    if not die_with(int(parent)):
        return 0
    signal.signal(signal.SIGTERM, _leave)
    order = json.loads(sys.stdin.read())
    known = {each.name for each in fields(Setting)}
    assert set(order["setting"]) == known, "parent and child run the same code"
    try:
        do(name, setting_from(order["setting"]), order["command"])
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, so that the `with` blocks stop their clusters."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
