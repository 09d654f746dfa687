"""The questions of the first call on a lent GPU, asked of the CPU: a slip should not cost a stage."""

import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from tools.benchmarks.gpu_probe import main, started_mps

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of the profiler, and of kernels that a CPU lacks


def asked(what: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["--device", "cpu", "--quick", what], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output.splitlines()[-1])[what]
    return found


def test_it_says_what_is_there() -> None:
    found = asked("there")
    assert set(found["sdp"]) == {"flash", "mem_efficient", "cudnn", "math"}
    assert found["free GiB"] > 0


def test_attention_is_asked_of_each_backend_and_one_that_is_missing_is_told() -> None:
    found = asked("sdpa")
    assert len(found) == 4 * 4
    for name in ("start", "later, bools", "step"):
        assert found[f"MATH {name}"]["error"] < 1e-4
    assert "failure" in found["CUDNN_ATTENTION start"]


@pytest.mark.parametrize("what", ["kernel", "model"])
def test_kernels_and_steps_are_timed(what: str) -> None:
    found = asked(what)
    cells = {name: cell for name, cell in found.items() if name != "how"}
    assert list(cells) == ["1 x 32", "1 x 33", "2 x 32", "2 x 33"]
    assert "failure" not in json.dumps(cells)
    for cell in cells.values():
        assert cell["error"] < 1e-5 if what == "kernel" else cell["sampled launches"] > 0


def test_without_the_card_it_says_so_and_mps_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = CliRunner().invoke(main, ["--device", "cuda:7", "there"])
    assert result.exit_code == 1
    assert "there is no device 'cuda:7' here" in result.output
    assert asked("ipc") == {"shared": "needs a GPU"}
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be started"))
    with started_mps() as state:
        assert "no nvidia-cuda-mps-control" in state


def test_mps_is_on_for_what_is_started_within_and_off_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    said = tmp_path / "said"
    control = tmp_path / "nvidia-cuda-mps-control"
    control.write_text(f'#!/bin/sh\necho "$CUDA_MPS_PIPE_DIRECTORY $* $(cat)" >> {said}\n')
    control.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(control))
    show = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_MPS_PIPE_DIRECTORY'))"]
    with started_mps() as state:
        assert state == "on"
        within = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    after = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    assert after == "None"
    start, stop = said.read_text().splitlines()
    assert start.split() == [within, "-d"]
    assert stop.split() == [within, "quit", "-t", "1"]
