"""`bench disagg`: verdicts on the adaptive arm rest on enough requests, and name the trade."""

from dataclasses import replace

import pytest

from baton.wire.records import Timings
from tools.benchmarks.disagg_verdicts import ENOUGH, adaptive_verdicts, interval, share
from tools.measure.slo import Slo, Summary, Trace, summarise
from tools.measure.split import ADAPTIVE, COLOCATED, PD, adaptive_split, options_for

PLAIN = Summary(100, 200, 10, 20, 30, 1.0, 50, 0, 0, 0, requests=30, met=27, gaps=900)
NEAR = ((COLOCATED, "ttft_p50", "TTFT p50"), (PD, "itl_p99", "ITL p99"))
DECIDED = {("decode", "waiting"): 40, ("prefill", "itl"): 20}


def arms(
    ours: Summary, split: Summary = PLAIN, colocated: Summary = PLAIN
) -> dict[str, list[Summary]]:
    return {PD: [split] * 2, COLOCATED: [colocated] * 2, ADAPTIVE: [ours] * 2}


def verdicts(found: dict[str, list[Summary]]) -> list[str]:
    return adaptive_verdicts("2 requests/s", found, ADAPTIVE, DECIDED, near=NEAR)


def test_with_few_requests_there_are_shares_and_no_verdict() -> None:
    few = replace(PLAIN, requests=ENOUGH // 2 - 1, met=20)
    (line,) = verdicts(arms(few))
    assert "No verdict: 48 requests, 50 wanted" in line
    assert "83% of 48" in line


def test_as_good_as_the_best_and_near_is_a_hit_without_a_trade() -> None:
    found = verdicts(arms(PLAIN))
    assert len(found) == 3
    assert all(line.endswith("hit") for line in found)
    assert "90% of 60" in found[0]


def test_where_it_loses_the_trade_and_the_decisions_are_told() -> None:
    worse = replace(PLAIN, met=20, ttft_p50=150, itl_p99=10)
    first, ttft, itl, trade = verdicts(arms(worse, colocated=replace(PLAIN, met=29)))
    assert "the best other arm colocated 97%" in first
    assert first.endswith("0.69 times, at least 0.95 wanted: MISS")
    assert ttft.endswith("MISS")
    assert itl.endswith("hit")
    assert "TTFT p50 1.50 and ITL p99 0.50 times P/D's" in trade
    assert "decode filled 40 (waiting), prefill filled 20 (itl)" in trade


def test_without_other_arms_there_is_nothing_to_say() -> None:
    assert verdicts({ADAPTIVE: [PLAIN]}) == []


def test_an_interval_holds_its_share_and_shrinks() -> None:
    for met, count in ((0, 10), (5, 10), (10, 10), (500, 1000)):
        low, high = interval(met, count)
        assert 0 <= low <= met / count <= high <= 1
    assert interval(0, 0) == (0.0, 1.0)
    wide, narrow = interval(5, 10), interval(500, 1000)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


def test_a_summary_counts_the_requests_within_the_slo() -> None:
    traces = [Trace(0.0, (ttft, ttft + 0.1), Timings()) for ttft in (0.5, 0.9, 2.0)]
    traces.append(Trace(0.0, (9.0,), Timings(), watched=False))
    found = summarise(traces, Slo(1.0, 0.2), (0.0, float("inf")))
    assert (found.requests, found.met, found.gaps) == (3, 2, 3)
    assert share([found, found]) == pytest.approx(2 / 3)


def test_the_adaptive_arm_differs_in_its_policy_and_is_told_the_limits() -> None:
    options = options_for(
        adaptive_split(2048), model="demo", dtype="auto", streams=4, slo=(0.5, None)
    )
    router = options.arguments("router")
    assert router[-4:] == ["--role-policy", "adaptive", "--slo-ttft", "0.5"]
    assert not options.topology.colocated
