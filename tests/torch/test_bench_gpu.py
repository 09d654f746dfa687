"""The GPU benchmark's own code, on the CPU: a slip in it should not cost somebody a GPU session."""

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.gpu import Report, main


def test_it_runs_through_and_writes_what_it_found(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {"limits", "demo decode 1", "demo prefill 64", "all processes"} <= set(sections)
    failures = [name for name, it in sections.items() if "failure" in str(it)]
    assert failures == []


def test_a_section_that_fails_is_recorded_and_the_rest_goes_on() -> None:
    def broken() -> None:
        raise RuntimeError("no card\nand more")

    report = Report()
    assert report.section("a", broken) == {"failure": "RuntimeError: no card"}
    assert report.section("b", lambda: 1.0) == 1.0
    assert set(report.sections) == {"a", "b"}
