"""The large studies of the lab, with real clusters and the bundled model; `make test-lab`.

`make test` has what is decided from their numbers (tests/pure/test_lab_*) and one quick study as a user
types it (tests/cluster/test_lab.py).
"""

import os
import struct
from pathlib import Path

import pytest

from baton.errors import BatonError
from tests.cluster.processes import children_of, terminals
from tests.cluster.test_lab import check_memory, checked_report, lines_of, rows_under
from tools.lab import claims, disagg, disagg_runs
from tools.lab.claims_findings import CLAIMS
from tools.lab.disagg_findings import TOO_FEW
from tools.lab.study import Notebook, Setting, Study
from tools.measure.split import CHUNKED, COLOCATED, PD


def notebook_in(folder: Path) -> Notebook:
    return Notebook(folder / "study.jsonl", lambda text: None)


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def assert_pictures(folder: Path, study: Study, count: int) -> None:
    assert len(study.pictures) == count
    for picture in study.pictures:
        width, height = size_of_png(folder / picture.file)
        assert min(width, height) > 300


def test_the_disaggregation_study_has_numbers_pictures_and_a_conclusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disagg_runs, "TRANSPORTS", ("frames", "cuda_ipc"))
    setting = Setting(tmp_path, quick=True, rates=(8.0,), prompt_lengths=(64, 5000))
    study = disagg.run(setting, notebook_in(tmp_path))

    failed = {failure.what: failure.why for failure in study.failures}
    assert failed.keys() == {"hand-over of 5000 tokens", "hand-over by cuda_ipc"}
    assert "GPU" in failed["hand-over by cuda_ipc"]
    assert_pictures(tmp_path, study, 3)
    shares, cells, handover = study.tables
    assert len(shares.rows) == 2 * 3
    assert cells.header[1:4] == (PD, COLOCATED, CHUNKED)
    assert len(cells.rows) == 5 + 6
    assert {row[-1] for row in cells.rows} == {TOO_FEW}  # a quick run has a dozen requests
    assert [row[0] for row in handover.rows] == ["frames over ipc, 64 tokens"]
    assert float(handover.rows[0][2]) > 0.0
    assert study.findings[-1].startswith("So this run decides nothing")
    found = lines_of(tmp_path / "study.jsonl")
    assert {line["arm"] for line in found if line["what"] == "streams"} == {PD, COLOCATED, CHUNKED}
    assert {line["load"] for line in found if line["what"] == "rate"} != set()
    assert len({line["load"] for line in found if line["what"] == "rate"}) == 1  # the same for all
    assert children_of(os.getpid()) == {}


def test_the_claims_study_has_a_verdict_for_every_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: object) -> None:
        raise BatonError("made to fail")

    monkeypatch.setattr(claims, "batching", breaks)
    study = claims.run(Setting(tmp_path, quick=True, rounds=1), notebook_in(tmp_path))

    failed = {failure.what: failure.why for failure in study.failures}
    assert failed.keys() == {"torch.compile", "batching"}
    assert failed["batching"] == "made to fail"
    verdicts = {row[0]: row[6] for row in study.tables[0].rows}
    assert verdicts.keys() == {claim.title for claim in CLAIMS}
    assert {title for title, found in verdicts.items() if found == "not measured"} == {
        "torch.compile", "batching",
    }  # fmt: skip
    assert verdicts["half precision"] == "reproduced"
    assert any("draft tokens were accepted" in line for line in study.findings)
    assert_pictures(tmp_path, study, 1)
    assert {
        line["key"] for line in lines_of(tmp_path / "study.jsonl") if line["what"] == "claim"
    } == {claim.key for claim in CLAIMS if claim.title not in ("torch.compile", "batching")}
    assert children_of(os.getpid()) == {}


def test_three_quick_studies_make_a_report_whose_links_and_tables_hold(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    with terminals() as opened:
        said = opened("main.py", "lab", "baseline", "batching", "kv-cache", "--quick", "--model",
                      "demo", "--batch-sizes", "1,2", "--windows-ms", "0", "--prompt-lengths",
                      "16,32,64", "--output", folder).ends(0)  # fmt: skip
    assert "report    " in said
    report = checked_report(folder)
    one_window = report.count("- [ ] batch sizes and windows")  # nothing to compare
    assert report.count("- [x] ") == 7 - one_window
    assert "## Failures\n\nNone." in report
    baseline, batching = (
        f"python main.py lab {name} --model demo" for name in ("baseline", "batching")
    )
    assert f"    {baseline} --quick" in report  # without the options it would refuse
    assert f"    {batching} --batch-sizes 1,2 --windows-ms 0 --quick" in report

    stages = {row[0]: float(row[2].replace(",", "")) for row in rows_under(report, "Stages of one")}
    assert stages["decode"] > 0
    assert stages["prefill"] > 0
    sizes = rows_under(report, "Batch size, at one window")
    assert [row[:3] for row in sizes] == [["1", "0", "burst"], ["2", "0", "burst"],
                                          ["1", "0", "staggered"], ["2", "0", "staggered"]]  # fmt: skip
    assert all(float(row[10].replace(",", "")) > 0 for row in sizes)
    requests = [each for each in lines_of(folder / "batching.jsonl") if each["what"] == "request"]
    assert len(requests) == 2 * (8 + 4)
    for each in requests:
        assert each["total_s"] == pytest.approx(each["queueing_s"] + each["execution_s"])  # type: ignore[operator]
    kinds = {str(each["what"]) for each in lines_of(folder / "baseline.jsonl")}
    assert kinds == {"environment", "limits", "load", "request", "share"}
    check_memory(folder, report)
