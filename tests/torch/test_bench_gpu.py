"""The GPU benchmark's own code, on the CPU: a bug in it should not cost a GPU session."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from baton.package import ROOT
from tests.patience import OUTLIVES_S, PATIENCE_S
from tools.benchmarks import gpu
from tools.benchmarks.gpu import Report, all_sections, full, main, share
from tools.benchmarks.gpu_sections import Cell, attempt

GPU = torch.device("cuda:0")


def found_by(arguments: list[str], folder: Path) -> dict[str, dict[str, object]]:
    quick = ["--device", "cpu", "--quick", "--output", str(folder), *arguments]
    result = CliRunner().invoke(main, quick, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    sections: dict[str, dict[str, object]] = json.loads((folder / "gpu.json").read_text())[
        "sections"
    ]
    assert "failure" not in json.dumps(sections)
    return sections


def test_the_engines_sections_run_through(tmp_path: Path) -> None:
    found = found_by(["--in-process", "--only", "limits", "--only", "engine"], tmp_path)
    assert list(found) == ["limits", "engine demo"]
    cells = found["engine demo"]["cells"]
    assert isinstance(cells, dict)
    assert {"demo decode 1", "demo decode 2", "demo prefill 64"} < set(cells)
    assert all(cells[name]["ms"] > 0 for name in cells if "how" not in name)


def test_transformers_sections_run_through(tmp_path: Path) -> None:
    found = found_by(["--in-process", "--only", "transformers"], tmp_path)
    cells = found["transformers demo"]["cells"]
    assert isinstance(cells, dict)
    names = [f"demo transformers {kind} {n}" for kind in ("generate", "continuous") for n in (1, 2)]
    assert list(cells) == names


def test_the_processes_sections_run_through(tmp_path: Path) -> None:
    found = found_by(["--in-process", "--only", "hand-over", "--only", "first"], tmp_path)
    cells = found["first token"]["cells"] | found["hand-over"]["cells"]  # type: ignore[operator]
    assert cells["first token P/D"]["copied MB"] == 0
    assert cells["hand-over pinned"]["copied MB"] > 0


def test_a_section_is_a_process_of_its_own(tmp_path: Path) -> None:
    found = found_by(["--only", "limits"], tmp_path)
    assert set(found["limits"]["cells"]) == {"limits"}  # type: ignore[call-overload]


def test_a_section_that_fails_is_recorded_and_the_rest_goes_on() -> None:
    def broken() -> Iterator[Cell]:
        yield "half", {"ms": 1.0}
        raise RuntimeError("no card\nand more")

    def whole() -> Iterator[Cell]:
        yield "all", {"ms": 2.0, "tokens/s": 3.0}

    report = Report()
    report.section("a", broken)
    report.section("b", whole)
    assert report.sections["a"]["failure"] == "RuntimeError: no card"
    assert [line[0] for line in report.lines()] == ["half", "all"]


def test_a_cell_that_fails_does_not_end_its_section() -> None:
    def cells() -> Iterator[Cell]:
        for memory in (1, 9):
            yield attempt(f"batch {memory}", lambda memory=memory: {"ms": float([2.0][memory - 1])})

    report = Report()
    report.section("a", cells)
    assert report.sections["a"]["cells"] == {
        "batch 1": {"ms": 2.0},
        "batch 9": {"failure": "IndexError: list index out of range"},
    }


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.abort()", "its process ended with -6"),
        (
            f"import sys; sys.stdin.read(); import time; time.sleep({OUTLIVES_S})",
            "not done after 1 s",
        ),
        ('print(\'{"failure": "RuntimeError: CUDA error"}\')', "RuntimeError: CUDA error"),
    ],
)
def test_a_process_that_ends_badly_or_not_at_all_is_recorded_with_its_cells(
    code: str, why: str
) -> None:
    cell = 'print(\'{"cell": "x", "found": {"ms": 1.0}}\', flush=True); '
    report = Report()
    seconds = 1.0 if "not done" in why else PATIENCE_S
    report.process("a", [sys.executable, "-c", cell + code], seconds)
    assert report.sections["a"]["failure"] == why
    if "not done" not in why:  # it may not have got so far in a second
        assert report.sections["a"]["cells"] == {"x": {"ms": 1.0}}


def test_the_script_runs_tests_and_figures_at_the_root(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$PWD: $*"\n')
    fake.chmod(0o755)
    script = ROOT / "tools" / "benchmarks" / "gpu.sh"
    subprocess.run(
        [script, tmp_path / "out"], cwd=tmp_path, env=os.environ | {"PYTHON": str(fake)},
        check=True, capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    texts = {each.name: each.read_text() for each in (tmp_path / "out").iterdir()}
    tests = "tests/gpu tests/triton/test_triton_attention.py"
    assert texts["tests.txt"] == f"{ROOT}: -m pytest -q {tests}\n"
    assert texts["gpu.txt"].startswith(f"{ROOT}: -m tools.benchmarks.gpu --budget 330 --output ")


def test_without_the_card_it_says_so() -> None:
    result = CliRunner().invoke(main, ["--device", "cuda:7"])
    assert result.exit_code == 1
    assert "there is no device 'cuda:7' here" in result.output


def test_when_the_time_is_over_what_is_left_is_named(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--budget", "0", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {each["failure"] for each in sections.values()} == {"no time was left"}


def test_a_session_takes_what_the_issue_asks_for() -> None:
    plan = full(GPU)
    assert (plan.batches, plan.prefills) == ((1, 8, 64, 256), (2048, 8192))
    names = list(all_sections(plan, [f"random:{shape}" for shape in gpu.SHAPES]))
    assert names[:4] == ["limits", *(f"engine random:{shape}" for shape in gpu.SHAPES)]
    assert {"attention", "hand-over", "first token", "fp8 random:qwen2-7b"} < set(names)


def test_the_share_is_of_whichever_limit_is_nearer() -> None:
    top = {"GB/s": 1000.0, "TFLOP/s": 100.0}
    assert share({"ms": 2.0, "bytes": 1e9, "flops": 1e9}, top) == "50%"
    assert share({"ms": 20.0, "bytes": 1e9, "flops": 1e12}, top) == "50%"
    assert share({"ms": 2.0, "bytes": 0, "flops": 0}, top) == ""
    assert share({"ms": 2.0, "bytes": 1e9, "flops": 1e9}, None) == ""
