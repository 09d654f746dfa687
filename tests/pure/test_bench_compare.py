"""The arithmetic of the benchmarks: what is called a win, a hit, a latency."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.wire.records import Timings
from tools.benchmarks.compare import Arm, judge, ratio, same_start
from tools.benchmarks.disagg_report import compared, figures, idle_lines, verdicts
from tools.measure.slo import Slo, Summary, Trace, percentile, summarise
from tools.measure.split import Setting, differences
from tools.measure.workload import mixed, poisson, single

SETTING = Setting("m", "f", "float32", 1024, "compiled", (0, 1), 8, "greedy")


def test_a_slow_round_that_hits_both_arms_falls_out_of_the_ratio() -> None:
    assert ratio((20.0, 2.0, 22.0), (10.0, 1.0, 11.0)) == 2.0


def test_an_arm_that_failed_has_no_ratio() -> None:
    assert ratio((1.0,), ()) == 0.0


def test_a_slow_round_that_hits_the_machine_falls_out_of_the_share() -> None:
    arms = {"ours": Arm((95.0, 47.0, 94.0)), "p": Arm((95.0, 47.0, 94.0))}
    verdict = judge(arms, "ours", (100.0, 50.0, 100.0), ("ours",))
    assert verdict.share == pytest.approx(0.94)
    assert verdict.hit


@pytest.mark.parametrize(
    ("ours", "peer", "roofline", "goal", "hit"),
    [
        (100.0, 90.0, 200.0, 99.0, True),  # 1.1 times the peer is the lower
        (98.0, 90.0, 200.0, 99.0, False),
        (91.0, 100.0, 100.0, 90.0, True),  # 90 % of the roofline is the lower
        (89.0, 100.0, 100.0, 90.0, False),
    ],
)
def test_the_goal_is_the_lower_of_the_two(
    ours: float, peer: float, roofline: float, goal: float, hit: bool
) -> None:
    arms = {"ours": Arm((ours,)), "p": Arm((peer,)), "failed": Arm(failure="x")}
    verdict = judge(arms, "ours", (roofline,), ("ours",))
    assert verdict.goal == pytest.approx(goal)
    assert verdict.hit is hit
    assert verdict.peer == "p"


def test_our_own_other_arm_is_no_peer() -> None:
    arms = {"ours": Arm((100.0,)), "P/D": Arm((500.0,)), "p": Arm((90.0,))}
    assert judge(arms, "ours", (1000.0,), ("ours", "P/D")).peer == "p"


def test_an_arm_of_ours_that_failed_hits_nothing() -> None:
    assert not judge({"ours": Arm(failure="x")}, "ours", (100.0,), ("ours",)).hit


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_same_start(a: list[int], b: list[int]) -> None:
    share = same_start(a, b)
    length = min(len(a), len(b))
    same = round(share * length)
    assert a[:same] == b[:same]
    assert share == 1.0 or a[same] != b[same]


def trace(intended: float, *tokens: float, watched: bool = True, handed: float = 0.0) -> Trace:
    timings = Timings(handover_s=handed, kv_bytes=1000 if handed else 0)
    return Trace(intended, tokens, timings, watched)


def test_latency_counts_from_the_intended_arrival() -> None:
    assert trace(1.0, 3.0, 3.5).ttft == 2.0


def test_a_summary() -> None:
    traces = [
        trace(0.0, 1.0, 1.1, 1.3, 9.0),
        trace(0.0, 2.0, 2.1, handed=0.002),
        trace(0.0, 50.0, watched=False),
    ]
    found = summarise(traces, Slo(1.5, 100.0), (0.0, 5.0))
    assert found.ttft_p50 == pytest.approx(1000)
    assert found.ttft_p99 == pytest.approx(2000)
    assert found.itl_max == pytest.approx(200)  # the gap that ends after the window is not counted
    assert found.goodput == pytest.approx(1 / 50)
    assert found.tokens_per_s == pytest.approx(7 / 50)
    assert found.handover_ms == pytest.approx(2.0)


def test_nothing_watched_is_no_division_by_zero() -> None:
    assert summarise([], Slo(1, 1), (0, 1)).goodput == 0.0


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 100))
def test_a_percentile_is_one_of_the_values_with_enough_below(
    values: list[float], at: float
) -> None:
    found = percentile(values, at)
    assert found in values
    assert sum(value <= found for value in values) >= at / 100 * len(values) - 1e-9


def test_loads_are_the_same_for_a_seed_and_fit_the_context() -> None:
    def make(seed: int) -> str:
        return poisson(5, seconds=10, prompt=100, new_tokens=8, seed=seed, context=128).digest

    assert make(1) == make(1)
    assert make(1) != make(2)
    load = poisson(5, seconds=10, prompt=100, new_tokens=8, seed=1, context=128)
    assert all(len(each.prompt) + each.new_tokens <= 128 for each in load.requests)
    assert [each.at for each in load.requests] == sorted(each.at for each in load.requests)
    assert all(each.at < 10 for each in load.requests)


def test_the_mean_rate_of_arrivals_is_the_one_asked_for() -> None:
    load = poisson(20, seconds=200, prompt=8, new_tokens=1, seed=3, context=64)
    assert len(load.requests) == pytest.approx(4000, rel=0.1)


def test_in_the_mixed_load_the_streams_are_watched_and_the_prompts_are_not() -> None:
    load = mixed(streams=3, stream_tokens=50, prompt=200, every=2.0, count=4, seed=1)
    assert [each.watched for each in load.requests] == [True] * 3 + [False] * 4
    assert [each.at for each in load.requests[3:]] == [1.0, 3.0, 5.0, 7.0]
    assert len(single(9, 2, 1).requests) == 1


def test_arms_that_differ_in_more_than_the_split_are_told_with_both_values() -> None:
    other = replace(SETTING, dtype="bfloat16", cores=(0,))
    assert differences({"a": SETTING, "b": SETTING}) == []
    found = differences({"a": SETTING, "b": other})
    assert found == [
        "dtype: 'float32' in a, 'bfloat16' in b",
        "cores: (0, 1) in a, (0,) in b",
    ]


def summary(**given: float) -> Summary:
    plain = dict.fromkeys(Summary.__slots__, 10.0) | given
    return Summary(**plain)  # type: ignore[arg-type]


def test_wins_losses_and_draws_are_all_said() -> None:
    arms = {
        "P/D": [summary(itl_p99=5.0, goodput=8.0)],
        "other": [summary(itl_p99=50.0, goodput=10.0)],
    }
    said = compared(arms, "P/D")
    assert "wins ITL p99 (10.00x)" in said
    assert "loses goodput (0.80x)" in said
    assert "draws" in said
    assert "other" in figures(arms)


def test_the_bars_are_hit_or_missed_by_the_figures() -> None:
    def said(itl: float, handed: float, copied: float) -> list[bool]:
        arms = {
            "a": [summary(itl_p99=itl, handover_ms=handed, moved_bytes=copied)],
            "b": [summary(itl_p99=100.0)],
            "c": [summary(itl_p99=30.0)],
        }
        return [line.endswith("hit") for line in verdicts({"mixed": arms}, "a", "b", "c")]

    assert said(15.0, 1.0, 0.0) == [True, True, True, True]
    assert said(25.0, 1.0, 0.0) == [False, True, True, True]
    assert said(35.0, 3.0, 5.0) == [False, False, False, False]


def test_the_parts_of_an_idle_first_token_add_up() -> None:
    dice = random.Random(1)
    timings = Timings(prefill_s=0.5, handover_s=0.01)
    one = Trace(0.0, (0.6, 0.62, 0.64), timings)
    text = idle_lines({"P/D": [one] * 3}, dice.randint(5, 9))
    assert "600.0" in text
    assert "500.0" in text
    assert "70.0" in text
