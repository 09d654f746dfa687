"""`python main.py lab` as a user types it, with the bundled model: the report of one study, and what is
refused. `make test-lab` has the large studies (tests/lab)."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import Terminal, children_of, terminals
from tests.patience import until
from tools.lab.report import slug

Type = Callable[..., Terminal]


@pytest.fixture
def type_in() -> Iterator[Type]:
    with terminals() as opened:
        yield opened


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_under(report: str, heading: str) -> list[list[str]]:
    table = report.split(f"### {heading}", 1)[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()][
        2:
    ]


def checked_report(folder: Path) -> str:
    """The report of this folder, whose links lead somewhere, and which knows of no failure."""
    report = (folder / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", report)
    anchors = [slug(line.lstrip("# ")) for line in report.splitlines() if line.startswith("#")]
    assert len(set(anchors)) == len(anchors)
    for target in targets:
        assert target[1:] in anchors if target[0] == "#" else (folder / target).is_file(), target
    assert "## Failures\n\nNone." in report
    return report


def check_memory(folder: Path, report: str) -> None:
    """The KV cache study of the bundled model with prompts of 16, 32 and 64 tokens."""
    memory = rows_under(report, "Memory of the KV cache")
    assert [row[:3] for row in memory if row[1] == "on"] == [
        ["16", "on", "0.262"], ["32", "on", "0.393"], ["64", "on", "0.655"]
    ]  # fmt: skip
    assert "Both ways wrote the same tokens, at every length." in report
    experiments = lines_of(folder / "kv-cache.jsonl")
    assert sum(each["what"] == "experiment" for each in experiments) == 6


@pytest.fixture(scope="module")
def quick_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a quick study leaves."""
    folder = tmp_path_factory.mktemp("report")
    with terminals() as opened:
        said = opened("main.py", "lab", "kv-cache", "--quick", "--model", "demo",
                      "--prompt-lengths", "16,32,64", "--output", folder).ends(0)  # fmt: skip
    assert "report    " in said
    return folder


def test_a_quick_study_makes_a_report_whose_links_and_tables_hold(quick_report: Path) -> None:
    report = checked_report(quick_report)
    assert "    python main.py lab kv-cache --model demo" in report
    check_memory(quick_report, report)


def test_a_study_that_is_broken_off_leaves_the_others_and_no_process(
    type_in: Type, quick_report: Path, tmp_path: Path
) -> None:
    for each in quick_report.glob("kv-cache*"):  # the others were never made in this folder
        shutil.copy(each, tmp_path)
    second = type_in("main.py", "lab", "batching", "--batch-sizes", "1", "--windows-ms", "0",
                     "--quick", "--model", "demo", "--output", tmp_path)  # fmt: skip
    until(lambda: "round 1: batch 1" in second.said, "the first cell")
    (child,) = children_of(second.process.pid).values()
    second.signal(signal.SIGINT)
    assert "interrupted: SIGINT" in second.ends(130)
    assert not Path(f"/proc/{child}").exists()
    report = (tmp_path / "README.md").read_text()
    assert "## KV cache" in report
    assert "* batching: was interrupted; its measurements are in batching.jsonl.part" in report
    assert any(each["what"] == "round" for each in lines_of(tmp_path / "batching.jsonl.part"))


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--model", "no-such-model"), 3, "there is no model 'no-such-model'"),
        (("batching", "--batch-sizes", "1,x"), 2, "got 'x'"),
        (("baseline", "--rates", "1"), 2, "--rates is read by disagg, not by baseline"),
        (("kv-cache", "--prompt-lengths", "9999", "--model", "demo"), 2, "at most"),
        (("no-study",), 2, "no-study"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_starts(
    type_in: Type, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    said = type_in("main.py", "lab", *words, "--output", tmp_path / "report").ends(code)
    assert told in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "report").exists()
