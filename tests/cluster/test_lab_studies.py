"""The lab's studies with real clusters and the bundled model: numbers, pictures, and nothing left."""

import json
import os
import signal
import struct
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.errors import BatonError, InputError, ModelError, WorkerLost
from baton.host import process_runs
from baton.model_files import resolve_model
from tests.cluster.processes import children_of, until
from tools.lab import claims, claims_engine, disagg, disagg_runs
from tools.lab.claims_findings import CLAIMS
from tools.lab.disagg_findings import TOO_FEW
from tools.lab.study import Notebook, Setting, Study
from tools.measure.split import CHUNKED, COLOCATED, PD, Split, started
from tools.measure.workload import Load, Planned, burst


def notebook_in(folder: Path) -> Notebook:
    return Notebook(folder / "study.jsonl", lambda text: None)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]


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
    found = lines_of(tmp_path)
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
    assert {line["key"] for line in lines_of(tmp_path) if line["what"] == "claim"} == {
        claim.key for claim in CLAIMS if claim.title not in ("torch.compile", "batching")
    }
    assert children_of(os.getpid()) == {}


def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    for run in (disagg.run, claims.run):
        with pytest.raises(ModelError, match="there is no model"):
            run(Setting(tmp_path, model="nowhere"), notebook_in(tmp_path))


def test_a_model_too_short_for_the_question_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(resolve_model("demo"), max_positions=100)
    monkeypatch.setattr(disagg, "resolve_model", lambda name: short)
    with pytest.raises(InputError, match="at least 256"):
        disagg.run(Setting(tmp_path, quick=True), notebook_in(tmp_path))


def test_runs_can_be_taken_back_and_a_process_that_dies_spoils_its_run() -> None:
    """The arm goes on after the first, and is gone with all its processes after the second."""
    endless = Load("long", (Planned(0.0, tuple(range(5, 25)), 2000),))
    split = Split("P/D", False, 2048)
    with started(split, model="demo", dtype="auto", streams=4) as arm:
        (trace,) = arm.drive(endless, enough=lambda now, running: now > 0.05)
        assert len(trace.tokens) < 2000
        after = arm.drive(burst(3, prompt=32, new_tokens=4, seed=1, context=2304))
        assert [len(each.tokens) for each in after] == [4, 4, 4]
        assert [len(each.token_ids) for each in after] == [4, 4, 4]
        pids = arm.pids()
        killer = threading.Thread(target=_kill_when_busy, args=(pids["decode-0"],))
        killer.start()
        with pytest.raises(WorkerLost, match="decode-0 died"):
            arm.drive(endless)
    killer.join()
    assert len(pids) == 3
    until(lambda: not any(map(process_runs, pids.values())), "the cluster's end")


def _kill_when_busy(pid: int) -> None:
    def ticks() -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    before = ticks()
    until(lambda: ticks() > before, "the first steps")
    os.kill(pid, signal.SIGKILL)


def test_torch_compile_gets_its_seconds_and_not_more() -> None:
    with pytest.raises(BatonError, match=r"not done within 0\.5 s"):
        claims_engine.torch_compile("demo", "float32", 1, limit_s=0.5)
    assert children_of(os.getpid()) == {}


def test_of_a_traceback_the_last_line_is_told() -> None:
    assert claims_engine.last_line("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert claims_engine.last_line("") == ""
