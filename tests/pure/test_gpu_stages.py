"""The prepared calls for a lent GPU: every stage starts, ends in time and reports, whatever it does. A
stand-in takes the place of Python; the shell scripts, `timeout` and the files are real."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["there", "transfer", "fast", "sdpa", "kernel", "model", "cluster", "beside", "beside-mps"]
SECOND = ["large", "fp8", "full-pool", "copying"]
WITHOUT_IPC = ["ipc", "frames", "large"]
LIMITS = {"first": 480, "second": 230}

STAND_IN = """#!/bin/sh
echo "$PWD: $*"
case "$*" in
  *"$HANGS"*) trap "$TRAP" TERM; while :; do sleep 0.1; done ;;
  *"$FAILS"*) echo "no card" >&2; exit 3 ;;
esac
echo '{"figures": 1}'
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def run(
    script: str, out: Path, python: Path, *, hangs: str = "@", fails: str = "@", trap: str = "-",
    **more: str,
) -> list[str]:  # fmt: skip
    """The lines of the summary."""
    env = {"PYTHON": str(python), "HANGS": hangs, "FAILS": fails, "TRAP": trap, "BATON_KILL_S": "1"}
    done = subprocess.run(
        [ROOT / "benchmarks" / f"gpu_{script}.sh", out], env=os.environ | env | more,
        cwd=python.parent, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = (out / f"{script}.summary.txt").read_text().splitlines()
    assert lines == done.stdout.splitlines()
    assert f"at most {LIMITS[script]} s" in lines[0]
    assert f" s of {LIMITS[script]}, all output in {out}" in lines[-1]
    return lines[1:-1]


def ends(lines: list[str]) -> dict[str, str]:
    """How each stage ended, in their order."""
    return {line.split()[0]: line[13:38].strip() for line in lines}


def test_every_stage_of_the_first_call_starts_and_reports(tmp_path: Path, python: Path) -> None:
    out = tmp_path / "out"
    lines = run("first", out, python)
    assert ends(lines) == dict.fromkeys(FIRST, "ok")
    assert all(line.endswith('{"figures": 1}') for line in lines)
    for stage in FIRST:
        assert (out / f"{stage}.txt").read_text().startswith(f"{ROOT}: -m ")
    probe = (out / "beside-mps.txt").read_text()
    assert "-m tools.benchmarks.gpu_probe --device cuda:0 beside --mps" in probe
    tests = (out / "transfer.txt").read_text()
    assert f"-W default --timeout 60 -p no:cacheprovider --junitxml {out}/transfer.xml" in tests
    assert (out / "logs").is_dir()


def test_a_stage_that_hangs_or_fails_is_told_and_the_rest_goes_on(
    tmp_path: Path, python: Path
) -> None:
    lines = run(
        "first", tmp_path / "out", python, hangs="sdpa", fails="test_fast", BATON_STAGE_S="sdpa:1"
    )
    expected = dict.fromkeys(FIRST, "ok") | {"sdpa": "timed out after 1 s", "fast": "failed with 3"}
    assert ends(lines) == expected
    assert next(line for line in lines if line.startswith("fast")).endswith("no card")


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path, python: Path) -> None:
    lines = run("second", tmp_path / "out", python, hangs=" ipc", trap="", BATON_STAGE_S="ipc:1")
    assert ends(lines) == dict.fromkeys(WITHOUT_IPC, "ok") | {"ipc": "timed out after 1 s"}


def test_the_second_call_goes_by_what_the_first_has_found(tmp_path: Path, python: Path) -> None:
    out = tmp_path / "out"
    run("first", out, python)
    assert ends(run("second", out, python)) == dict.fromkeys(SECOND, "ok")
    run("first", out, python, fails="test_transfer")
    assert ends(run("second", out, python)) == dict.fromkeys(WITHOUT_IPC, "ok")


def test_a_rehearsal_takes_small_sizes_on_the_cpu(tmp_path: Path, python: Path) -> None:
    out = tmp_path / "out"
    run("first", out, python, BATON_GPU_STAND_IN="1")
    run("second", out, python, BATON_GPU_STAND_IN="1")
    assert "gpu_probe --device cpu --quick model" in (out / "model.txt").read_text()
    large = (out / "large.txt").read_text()
    assert "gpu --device cpu --quick --budget 92" in large
    assert "--only limits --only engine demo" in large


@pytest.mark.parametrize("script", LIMITS)
def test_the_stages_fit_their_session_and_the_session_its_limit(script: str) -> None:
    """Those of each branch; a stage may take 5 s more to be killed, which the session's limit covers."""
    text = (ROOT / "tools" / "benchmarks" / f"gpu_{script}.sh").read_text()
    assert f"session {LIMITS[script]} {script}" in text
    for branch in re.split(r"^else$", text, flags=re.MULTILINE):
        limits = re.findall(r"^ *(?:probe|tests|figures) (\d+) [a-z0-9-]+ ", branch, re.MULTILINE)
        assert 0 < sum(map(int, limits)) <= LIMITS[script] - 6


def test_no_stage_begins_when_the_session_is_over(tmp_path: Path, python: Path) -> None:
    """With stages that claim more than there is: what is left is given, then nothing."""
    script = tmp_path / "gpu_short.sh"
    stages = ROOT / "tools" / "benchmarks" / "gpu_stages.sh"
    script.write_text(f". {stages}\nsession 6 short\nprobe 90 a a\nprobe 90 b b\nfinish\n")
    env = {"PYTHON": str(python), "HANGS": "a", "FAILS": "@", "TRAP": "-", "BATON_KILL_S": "1"}
    subprocess.run(["sh", script, tmp_path / "out"], env=os.environ | env, check=True, timeout=PATIENCE_S,
                   capture_output=True)  # fmt: skip
    lines = (tmp_path / "out" / "short.summary.txt").read_text().splitlines()
    assert re.match(r"a +timed out after [1-4] s", lines[1])
    assert "not run: no time was left" in lines[2]


def test_without_a_folder_it_says_what_it_needs() -> None:
    script = ROOT / "benchmarks" / "gpu_first.sh"
    done = subprocess.run([script], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
