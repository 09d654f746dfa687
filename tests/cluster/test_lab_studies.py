"""The lab's studies with real clusters and the bundled model: numbers, pictures, and nothing left."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import BatonError, InputError, ModelError, WorkerLost
from baton.host import process_runs, processor_time
from baton.model_files import resolve_model
from tests.cluster.processes import children_of
from tests.patience import until
from tools.lab import claims, claims_engine, disagg
from tools.lab.study import Notebook, Setting
from tools.measure.split import Split, started
from tools.measure.workload import Load, Planned, burst


def notebook_in(folder: Path) -> Notebook:
    return Notebook(folder / "study.jsonl", lambda text: None)


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
        return processor_time([pid]) or 0

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
