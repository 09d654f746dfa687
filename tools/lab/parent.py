"""Parent: runs each study in a process of its own and writes the report. No torch here, so that a wrong
option is refused at once."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from baton.errors import OutputError
from baton.package import ROOT
from tools.lab.report import render
from tools.lab.study import MODULES, Failure, Notebook, Saved, Setting, Study, load, save

LEAVE_S = 10.0  # from SIGTERM to SIGKILL: a study stops its clusters first
SPIN = {"GOMP_SPINCOUNT": "1000"}  # as our workers have it (baton/cluster/launch.py)


def run_study(name: str, setting: Setting, command: str) -> str:
    """Run a study. Returns the reason if it failed, else "". A failure is saved in its place."""
    if find_spec(MODULES[name]) is None:
        why = f"the module {MODULES[name]} is missing"
    else:
        why = _run_child(name, setting, command)
    if why:
        part = setting.output / f"{name}.jsonl.part"
        Notebook(part, print).record("failure", cell="the whole study", why=why)
        os.replace(part, part.with_suffix(""))
        save(setting.output, Saved(_failed(name, command, why), {}, {}))
    return why


def write_report(folder: Path) -> tuple[Path, list[Saved]]:
    """Write README.md from all results in the folder. Returns its path and the results."""
    saved, failures = load(folder)
    for part in sorted(folder.glob("*.jsonl.part")):
        name = part.name.removesuffix(".jsonl.part")
        failures.append(Failure(name, f"was interrupted; its measurements are in {part.name}"))
    path = folder / "README.md"
    try:
        path.write_text(render(saved, failures), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    return path, saved


def make_folder(folder: Path) -> None:
    """Create the report's folder. Raises OutputError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"--output {folder} cannot be used: {error.strerror}") from error


def _run_child(name: str, setting: Setting, command: str) -> str:
    order = {"setting": asdict(setting) | {"output": str(setting.output)}, "command": command}
    with tempfile.TemporaryFile() as order_file, tempfile.TemporaryFile() as errors:
        order_file.write(json.dumps(order).encode())
        order_file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.lab.child", name, "--parent", str(os.getpid())],
            cwd=ROOT,
            stdin=order_file,
            stderr=errors,
            env=SPIN | dict(os.environ),
            start_new_session=True,  # Ctrl-C is the parent's to handle, once
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        errors.seek(0)
        return "" if code == 0 else _last_line(errors.read().decode(errors="replace"), code)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(text: str, code: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = lines[-1].removeprefix("error: ") if lines and code > 0 else ""
    return last or f"its process ended with {how}"


def _failed(name: str, command: str, why: str) -> Study:
    return Study(
        name=name,
        title=name.capitalize(),
        question="This study failed as a whole.",
        varied="nothing",
        fixed={},
        command=command,
        findings=(),
        failures=(Failure("the whole study", why),),
    )
