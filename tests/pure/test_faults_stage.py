"""The plan of faults, how recovery is measured, what stands in the report."""

import asyncio
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from baton.failpoint import SITES
from tools.faults import report
from tools.faults.battery import Battery, Result
from tools.faults.check import Answer, Census, Process, check
from tools.faults.ledger import Chunk, End, Event, Sent
from tools.faults.service import Service
from tools.faults.stage import (
    RANDOM,
    STAGES,
    Fault,
    Injected,
    Injector,
    each_stage,
    longest_gap,
    record_recovery,
    silence,
)  # fmt: skip
from tools.faults.workload import Mix, cases


def test_every_stage_has_a_failpoint_and_is_planned_for_every_victim() -> None:
    assert {site for site, _ in STAGES.values()} <= SITES
    faults = each_stage(["router", "server"], 3, random.Random(1))
    planned = Counter((fault.victims, fault.stage) for fault in faults)
    stages = [*STAGES, RANDOM]
    assert planned == {((v,), s): 3 for v in ("router", "server") for s in stages}
    assert faults == each_stage(["router", "server"], 3, random.Random(1))
    assert faults != each_stage(["router", "server"], 3, random.Random(2))


def test_silence_is_the_longest_time_without_a_chunk_from_the_fault_on() -> None:
    chunks = [1.0, 2.0, 2.1, 6.0, 6.5]
    assert silence(chunks, 2.0, 6.2) == pytest.approx(3.9)
    assert silence(chunks, 2.05, 2.5) == pytest.approx(3.9), "it lasted longer than the repair"
    assert silence(chunks, 6.2, 9.0) == pytest.approx(2.5), "nothing came after it"
    assert silence([], 1.0, 4.0) == pytest.approx(3.0)


def test_recovery_is_counted_for_each_fault() -> None:
    result = Result("F", "x")
    fault = Fault(("decode-0",), "prefill")
    injected = [Injected(fault, 1.0, {}, 4.0), Injected(fault, 10.0, {}, None)]
    record_recovery(result, injected, [0.9, 1.1, 3.5, 4.1])
    assert result.injected == 2
    assert result.whole_s == [3.0]
    assert result.token_s == [pytest.approx(2.4)]


def test_a_victim_that_does_not_run_is_a_problem_and_no_quick_recovery() -> None:
    service = Absent()
    injector = Injector(service, random.Random(1))
    fault = Fault(("decode-0", "router"), RANDOM, replaced=False)
    asyncio.run(injector.run([fault]))
    assert injector.problems == [
        "kill decode-0 and router: a random moment: decode-0 did not run, so was not hit"
    ]
    assert [each.pids for each in injector.injected] == [{"router": 7}]


class Absent(Service):
    """Whole, though nobody but the router runs."""

    def pids(self) -> dict[str, int]:
        return {"router": 7}

    def signal(self, name: str, number: object) -> int | None:
        return self.pids().get(name)

    async def state(self) -> dict[str, Any]:
        alive = [{"role": role, "state": "alive"} for role in self.expected]
        return {"ready": True, "workers": alive}


def test_the_longest_wait_of_a_stream() -> None:
    streamed, whole = {"stream": True}, {"stream": False}
    alone: list[Event] = [Sent("c", 0, 0.0, whole), Chunk("c", 9.0, "one piece")]
    assert math.isnan(longest_gap(alone))
    events = [*alone, Sent("a", 0, 1.0, streamed), Sent("b", 0, 1.5, streamed)]
    events += [Chunk("a", 4.0, "x")]
    events += [Chunk("b", 3.0, "x"), Chunk("b", 7.5, "y"), End("a", 4.5, "done")]
    assert longest_gap(events) == pytest.approx(4.5)


def test_a_service_is_whole_only_with_every_worker() -> None:
    service = Service(expected={"prefill": 1, "decode": 2})
    workers = [{"role": r, "state": "alive"} for r in ("prefill", "decode", "decode")]
    assert service.whole({"ready": True, "workers": workers})
    assert not service.whole({"ready": True, "workers": workers[:2]})
    assert not service.whole({"ready": True, "workers": workers[1:]})
    assert not service.whole({"ready": False, "workers": workers})
    assert not service.whole({"ready": True, "degraded": "no prefill", "workers": workers})
    assert not service.whole(
        {"ready": True, "workers": [*workers[:2], workers[2] | {"state": "suspect"}]}
    )
    assert not service.whole({})


def test_requests_are_replayed_by_the_seed() -> None:
    assert cases(3, 20) == cases(3, 20) != cases(4, 20)
    bodies = dict(enumerate(cases(3, 20)))

    def drawn(seed: int) -> list[object]:
        following = Mix("x", seed, bodies).client(0, 10)
        return [following() for _ in range(11)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1)[-1] is None
    mix = Mix("x", 1, bodies)
    asked = [mix.client(n, 5) for n in range(2)]
    made = [request for each in asked for request in iter(each, None)]
    assert [request.id for request in made if request] == mix.ids
    assert len(set(mix.ids)) == 10


def test_a_result_collects_every_kind_of_problem(tmp_path: Path) -> None:
    result = Result("F", "x")
    result.judge(check([Sent("a", 0, 0, {})], {0: Answer("x", "stop", 1)}, ["a", "b"]))
    assert (result.requests, result.lost, result.wrong) == (2, 2, 0)
    good = Census({"router": Process(1, 1, 1)})
    result.compare(good, Census({"router": Process(1, 1, 1)}, leased=3, quarantined=1))
    result.require(False, "a pass line")
    result.require(True, "not this")
    assert result.leaked == 4
    assert len(result.problems) == 4
    assert not result.passed
    assert Battery(1, 0.1, tmp_path, print).count(100) == 10
    assert Battery(1, 0.001, tmp_path, print).count(100, least=3) == 3


ABOUT = report.About(
    7, 0.5, "abc1234", "2 cores", "2026-01-01 00:00 UTC", 90.0, "python -m tools.faults"
)


def test_the_report_names_what_failed() -> None:
    good = Result("F1", "killed", 3, 800, token_s=[0.5, 1.0, 2.0], whole_s=[4.0])
    bad = Result("F2", "stopped", 2, 100, lost=1, problems=["1 lost: a: HANG"], in_table=False)
    text = report.document([good, bad], ABOUT)
    assert "| F1 | killed | 3 | 800 | 0 | 0 | 1.0 / 2.0 s | 4.0 / 4.0 s | 0 | pass |" in text
    assert "| F2 | stopped | 2 | 100 | 1 | 0 | - | - | 0 | **FAIL** |" in text
    assert "**fails**: 1 lost: a: HANG" in text
    for word in ("seed 7", "scale 0.5", "abc1234", "2 cores", "1 of 2 rows passed"):
        assert word in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, "cells"
    assert "stopped" not in report.table([good, bad])
    assert "280 of 800" in text


def test_only_the_marked_part_of_the_readme_changes() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.marked(text, "new")
    assert new == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.marked(new, "new") == new
    with pytest.raises(ValueError, match="no <!-- faults"):
        report.marked("nothing", "new")
