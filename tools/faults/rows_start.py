"""F14, F15: starts that cannot work end at once, with one line that says what to do."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.faults.battery import Battery, Result
from tools.faults.service import ROOT

DEMO = ROOT / "baton" / "models" / "demo"
PORT_S, MODEL_S = 3.0, 30.0
"""On a machine under load; RELIABILITY's 1 and 2 s are for a calm one."""


def f14(battery: Battery) -> list[Result]:
    """A port that is in use."""
    result = Result("F14", "the port is in use", injected=1, in_table=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _refused(result, ["serve", "--port", port], 2, [port, "in use", "--port"], PORT_S)
    return [result]


def f15(battery: Battery) -> list[Result]:
    """Model folders that cannot be served."""
    result = Result("F15", "model folders that cannot be served", in_table=False)
    for name, folder in _broken(battery.folder / "models"):
        result.injected += 1
        _refused(result, ["serve", "--port", "0", "--model", str(folder)], 3, [], MODEL_S, name)
    return [result]


def _broken(root: Path) -> Iterator[tuple[str, Path]]:
    """Copies of the bundled model, each with one thing wrong."""
    shutil.rmtree(root, ignore_errors=True)
    yield "missing", root / "nothing-here"

    def copy(name: str) -> Path:
        shutil.copytree(DEMO, root / name)
        return root / name

    empty = root / "empty"
    empty.mkdir(parents=True)
    yield "empty", empty
    truncated = copy("truncated")
    for weights in truncated.glob("*.safetensors"):
        os.truncate(weights, weights.stat().st_size // 2)
    yield "truncated", truncated
    no_tokenizer = copy("no-tokenizer")
    (no_tokenizer / "tokenizer.json").unlink()
    yield "no tokenizer", no_tokenizer
    no_config = copy("no-config")
    (no_config / "config.json").write_text("{")
    yield "broken config", no_config
    strange = copy("strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    yield "another architecture", strange
    pickled = copy("pickled")
    for weights in pickled.glob("*.safetensors"):
        weights.rename(weights.with_name("pytorch_model.bin"))
    yield "pickled weights", pickled


def _refused(
    result: Result,
    words: Sequence[str],
    code: int,
    says: Sequence[str],
    within_s: float,
    name: str = "",
) -> None:
    """The command ends with this code, in time, with one line."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "main.py", *words], cwd=ROOT, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()
        result.problems.append(f"{name} {words[0]}: it runs on")
        return
    took = time.monotonic() - began
    last = said.replace(f"{ROOT}/", "").strip()[-300:]  # the page names no folder of this machine
    what = f"{name or words[0]}: exit code {process.returncode} after {took:.1f} s: {last}"
    result.notes.append(what)
    lines = [line for line in said.splitlines() if not line.startswith(("listening", "stopped"))]
    good = process.returncode == code and len(lines) == 1 and lines[0].startswith("error: ")
    result.require(good and all(each in said for each in says), what)
    result.bar(name or words[0], took, within_s)
