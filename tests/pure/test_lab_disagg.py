"""Findings of the disaggregation study from made-up numbers, and its plan."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, InputError
from baton.wire.records import Timings
from tools.lab.disagg_findings import (
    EVEN_CELL,
    GOODPUT,
    LESS,
    LOSES,
    MORE,
    RATE_METRICS,
    STREAM_METRICS,
    TOO_FEW,
    UNCLEAR,
    WINS,
    Cell,
    Handed,
    Round,
    cell_table,
    cells_of,
    conclusion,
    goodput_sentence,
    handover_findings,
    handover_table,
    interference_sentence,
    number,
    share_table,
    times,
    too_fast,
)
from tools.lab.disagg_plan import Pace, pace_for, plan_for, random_loads, rates_for, streams_load
from tools.lab.disagg_runs import check_path, ended_early, idle_of, rate_numbers, stream_numbers
from tools.lab.shares import Share
from tools.lab.study import Setting
from tools.measure.slo import Slo, Trace
from tools.measure.split import CHUNKED, COLOCATED, PD, three_splits
from tools.measure.workload import Planned

PACE = Pace(first=1.0, every=2.0, end=5.0)


FAR_APART = {PD: Share(60, 60), COLOCATED: Share(0, 60)}


def cell(*ratios: float, better: int = LESS, metric: str = "ITL p99", load: str = "a",
         requests: int = 60, shares: Mapping[str, Share] = FAR_APART) -> Cell:  # fmt: skip
    return Cell(load, metric, "ms", better, 1.0, {COLOCATED: 1.0}, COLOCATED, ratios, requests, 7.0,
                shares)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (cell(0.5, 0.9), WINS),
        (cell(2.0, 1.2), LOSES),
        (cell(0.5, 1.1), EVEN_CELL),  # the rounds disagree
        (cell(0.97, 0.98), EVEN_CELL),  # they agree on next to nothing
        (cell(1.03), EVEN_CELL),
        (cell(2.0, 1.2, better=MORE), WINS),
        (cell(0.5, 0.9, better=MORE), LOSES),
        (cell(inf, better=MORE), WINS),  # the others had none at all
        (cell(0.0, better=MORE), LOSES),
        (cell(inf), LOSES),  # P/D never answered
        (cell(0.0), WINS),
    ],
)
def test_a_cell_counts_if_the_rounds_agree_on_a_difference(found: Cell, verdict: str) -> None:
    assert found.verdict == verdict


def test_tokens_that_reach_the_client_together_have_no_gap_to_compare() -> None:
    found = Cell("a", "ITL p50", "ms", LESS, 7.8, {COLOCATED: 0.03}, COLOCATED, (275.0,), 60, 7.0,
                 FAR_APART)  # fmt: skip
    assert found.verdict == UNCLEAR
    assert cell_table([found], (PD, COLOCATED)).rows[0][-1] == UNCLEAR
    assert "makes no measured difference" in said([found])
    none = Cell("a", "goodput", "1/s", MORE, 3.0, {COLOCATED: 0.0}, COLOCATED, (inf,), 60, 7.0,
                FAR_APART)  # fmt: skip
    assert none.verdict == WINS


@given(st.lists(st.floats(0.01, 100), min_size=1), st.sampled_from([LESS, MORE]))
def test_what_one_side_wins_the_other_loses(ratios: list[float], better: int) -> None:
    other = {WINS: LOSES, LOSES: WINS, EVEN_CELL: EVEN_CELL}
    turned = [1 / each for each in ratios]
    assert cell(*turned, better=better).verdict == other[cell(*ratios, better=better).verdict]


def streams_round(itl: float, ttft: float = 100.0) -> Round:
    return {
        "itl_p50": 10.0,
        "itl_p99": itl,
        "itl_max": 2 * itl,
        "stream_tokens_per_s": 300.0,
        "long_ttft_p50": ttft,
        "requests": 8,
        "met": 2,
        "long_requests": 3,
        "window_s": 12.3,
    }


def rate_round(ttft: float, itl: float, goodput: float, met: int = 30, requests: int = 60) -> Round:
    return {
        "requests": requests,
        "met": met,
        "window_s": 30.0,
        "ttft_p50": ttft,
        "ttft_p99": ttft,
        "itl_p50": itl,
        "itl_p99": itl,
        "tpot_p50": itl,
        "goodput": goodput,
    }


def test_each_metric_is_held_against_the_better_colocated_arm() -> None:
    arms = {
        PD: {0: rate_round(200.0, 20.0, 3.0)},
        COLOCATED: {0: rate_round(100.0, 90.0, 1.0)},
        CHUNKED: {0: rate_round(120.0, 40.0, 2.0)},
    }
    found = {each.metric: each for each in cells_of("1 requests/s", arms, RATE_METRICS)}
    assert (found["TTFT p50"].best, found["TTFT p50"].ratio) == (COLOCATED, 2.0)
    assert (found["ITL p99"].best, found["ITL p99"].ratio) == (CHUNKED, 0.5)
    assert (found["goodput"].best, found["goodput"].ratio) == (CHUNKED, 1.5)


def test_rounds_are_compared_within_themselves_and_lost_ones_are_left_out() -> None:
    arms = {
        PD: {0: streams_round(10.0), 2: streams_round(30.0)},
        COLOCATED: {0: streams_round(20.0), 1: streams_round(1.0), 2: streams_round(60.0)},
    }
    found = {each.metric: each for each in cells_of("x", arms, STREAM_METRICS)}
    assert found["ITL p99"].ratios == (0.5, 0.5)


@pytest.mark.parametrize(
    "arms",
    [
        {},
        {PD: {0: streams_round(1.0)}},
        {COLOCATED: {0: streams_round(1.0)}},
        {PD: {0: streams_round(1.0)}, COLOCATED: {1: streams_round(1.0)}},
        {PD: {}, COLOCATED: {}},
    ],
)
def test_without_both_sides_of_a_round_there_is_no_cell(
    arms: Mapping[str, Mapping[int, Round]],
) -> None:
    assert cells_of("x", arms, STREAM_METRICS) == []


def test_nothing_measured_concludes_nothing() -> None:
    assert conclusion([]) == ["P/D was not measured beside a colocated cluster: no conclusion."]
    assert "was not measured" in goodput_sentence([], "SLO")
    assert "was not measured" in interference_sentence({PD: {}}, "x")
    assert handover_findings([], 50.0) == ["No hand-over was measured."]


def said(cells: Sequence[Cell]) -> str:
    return conclusion(cells)[-1]


def test_where_everything_is_won_it_pays_and_costs_nothing() -> None:
    found = said([cell(0.5), cell(0.5, metric="TTFT p50")])
    assert "it pays for traffic that is judged by ITL p99 and TTFT p50" in found
    assert "costs" not in found


def test_where_everything_is_lost_no_traffic_gains() -> None:
    found = said([cell(2.0), cell(3.0, metric="TTFT p50")])
    assert "no measured traffic gains from the split" in found
    assert "it costs traffic that is judged by ITL p99 and TTFT p50" in found


def test_a_mixed_result_is_told_metric_by_metric_and_load_by_load() -> None:
    cells = [
        cell(0.2),
        cell(2.0, metric="TTFT p50"),
        cell(0.5, metric="goodput", better=MORE),
        cell(2.0, metric="goodput", better=MORE, load="b"),
        cell(1.0, metric="ITL p50", load="b"),
    ]
    lines = conclusion(cells)
    assert (
        lines[0]
        == "a (60 requests in 1 window of 7.00 s an arm; threshold 5%): P/D wins ITL p99 (0.200 times); "
        "loses TTFT p50 (2.00 times), goodput (0.500 times)."
    )
    assert lines[1].endswith("threshold 5%): P/D wins goodput (2.00 times); loses nothing.")
    assert "Of 5 cells P/D wins 2 and loses 2; no difference: 1; not comparable" in lines[2]
    assert "it pays for traffic that is judged by ITL p99;" in lines[3]
    assert "it costs traffic that is judged by TTFT p50;" in lines[3]
    assert "it depends on the load for goodput" in lines[3]


def test_where_nothing_differs_that_is_said() -> None:
    assert "makes no measured difference" in said([cell(1.0), cell(1.01)])


def test_the_table_shows_losses_as_plainly_as_wins() -> None:
    table = cell_table([cell(0.5, 0.6), cell(2.0, 3.0), cell(1.0)], (PD, COLOCATED, CHUNKED))
    assert [row[-1] for row in table.rows] == ["P/D wins", "P/D loses", "no difference"]
    assert table.rows[0][-3] == "0.550 (0.500 .. 0.600)"
    assert table.rows[0][3] == "-"  # an arm that was not measured
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_goodput_is_told_rate_by_rate_with_what_it_rests_on() -> None:
    arms = {
        PD: {0: rate_round(1.0, 1.0, 2.0, 60)},
        COLOCATED: {0: rate_round(1.0, 1.0, 0.0, 0)},
    }
    found = goodput_sentence(cells_of("2 requests/s", arms, RATE_METRICS), "limits")
    assert "(limits)" in found
    assert (
        "2 requests/s: 2.00/s against 0 (wins; P/D 60 of 60 (100%; 95% interval 94% to 100%)"
        in found
    )
    assert "60 requests in 1 window of 30.0 s an arm" in found


@pytest.mark.parametrize("requests", [1, 3, 4, 49])
def test_below_fifty_requests_there_are_shares_with_intervals_and_no_verdict(requests: int) -> None:
    arms = {
        PD: {0: rate_round(1.0, 1.0, 9.0, requests, requests)},
        COLOCATED: {0: rate_round(9.0, 9.0, 0.0, 0, 60)},
    }
    cells = cells_of("2 requests/s", arms, RATE_METRICS)
    assert {each.verdict for each in cells} == {TOO_FEW}
    told = goodput_sentence(cells, "limits")
    assert f"P/D {requests} of {requests} (100%; 95% interval " in told
    assert "no verdict" in told
    for word in (WINS, LOSES):
        assert word not in told
    assert (
        f"no verdict, as {requests} requests in 1 window of 30.0 s are fewer"
        in conclusion(cells)[0]
    )
    assert said(cells) == "So this run decides nothing: every cell has fewer than 50 requests."


def test_the_rounds_of_a_cell_count_together() -> None:
    def rounds(ttft: float) -> dict[int, Round]:
        return {number: rate_round(ttft, 1.0, 1.0, 25, 25) for number in range(2)}

    cells = cells_of("x", {PD: rounds(1.0), COLOCATED: rounds(2.0)}, RATE_METRICS)
    assert (cells[0].requests, cells[0].verdict) == (50, WINS)


def test_long_prompts_are_counted_by_themselves() -> None:
    arms = {PD: {0: streams_round(1.0)}, COLOCATED: {0: streams_round(2.0)}}
    found = {each.metric: each.requests for each in cells_of("x", arms, STREAM_METRICS)}
    assert found["ITL p99"] == 8
    assert found["TTFT p50 of the long prompts"] == 3


def test_goodput_wins_only_if_the_shares_are_apart() -> None:
    near = {PD: Share(33, 60), COLOCATED: Share(27, 60)}
    assert cell(1.22, better=MORE, metric=GOODPUT, shares=near).verdict == EVEN_CELL
    far = {PD: Share(50, 60), COLOCATED: Share(27, 60)}
    assert cell(1.85, better=MORE, metric=GOODPUT, shares=far).verdict == WINS
    assert cell(1.22, better=MORE, metric="tokens/s", shares=near).verdict == WINS


def test_goodput_is_the_share_times_the_offered_rate_however_long_the_last_one_takes() -> None:
    slo = Slo(1.0, 1.0)
    good, bad = trace(0.0, 0.5, 0.6), trace(1.0, 3.0, 3.1)
    for end in (3.1, 500.0):
        late = trace(1.0, 2.9, end)
        found = rate_numbers([good, bad, late, good], slo, 2.0, 5.0)
        assert (found["goodput"], found["requests"], found["met"]) == (1.0, 4, 2)
        assert found["window_s"] == 5.0


def test_windows_are_long_enough_for_a_verdict_and_the_same_for_every_arm() -> None:
    plan = plan_for(setting(), 4096)
    for rate in (0.8, 2.5, 40.0):
        assert rate * plan.window_s(rate) * plan.rounds >= 50
    loads = random_loads(plan, (0.8,))
    assert sum(len(load.requests) for _, _, load in loads) >= 50
    quick = plan_for(setting(quick=True), 1024)
    assert quick.window_s(0.8) == quick.window_s(40.0) == quick.seconds


def test_shares_are_tabled_for_every_load_and_arm() -> None:
    arms = {PD: {0: rate_round(1.0, 1.0, 1.0)}, COLOCATED: {0: rate_round(1.0, 1.0, 1.0, 15)}}
    table = share_table(cells_of("2 requests/s", arms, RATE_METRICS))
    assert table.rows[0] == ("2 requests/s, P/D", "60", "1 x 30.0 s", "30", "50%", "37.7% .. 62.3%")
    assert len(table.rows) == 2


def test_what_streams_waited_for_is_told_for_each_arm() -> None:
    arms = {PD: {0: streams_round(20.0)}, COLOCATED: {0: streams_round(1000.0)}, CHUNKED: {}}
    found = interference_sentence(arms, "x")
    assert "40.0 ms with P/D (p99 20.0)" in found
    assert "2,000 ms with colocated (p99 1,000)" in found
    assert CHUNKED not in found


def test_numbers_for_people() -> None:
    assert [number(each) for each in (1234.5, 56.78, 0.123, inf)] == [
        "1,230",
        "56.8",
        "0.123",
        "never",
    ]
    assert times(inf) == "∞"


# ---- hand-over


def handed(transport: str, prompt: int, ms: float, moved: int = 0) -> Handed:
    return Handed(transport, prompt, 1000 * prompt, moved, ms, 10.0, 5.0)


def test_the_longest_prompt_is_told_by_each_transport() -> None:
    found = [
        handed("shm", 64, 0.1),
        handed("shm", 2048, 0.3),
        handed("frames", 2048, 2.0, 4_000_000),
    ]
    lines = handover_findings(found, 50.0)
    assert "2,048 tokens (2.05 MB)" in lines[0]
    assert "0.300 ms by shared memory, in place (nothing copied)" in lines[0]
    assert "2.00 ms by frames over ipc (2.00 GB/s)" in lines[0]
    assert "2.00 GB/s, below the 50.0 GB/s" in lines[1]
    assert len(handover_table(found).rows) == 3


def test_a_copy_that_is_faster_than_memory_is_called_wrong() -> None:
    found = [handed("frames", 2048, 0.01, 4_000_000)]
    assert len(too_fast(found, 50.0)) == 1
    assert "wrong" in handover_findings(found, 50.0)[1]
    assert too_fast(found, 500.0) == []


def test_where_nothing_is_copied_there_is_no_speed_to_check() -> None:
    assert too_fast([handed("shm", 2048, 0.0001)], 1.0) == []
    assert len(handover_findings([handed("shm", 2048, 0.1)], 1.0)) == 1


# ---- the plan


def setting(**given: object) -> Setting:
    return Setting(Path(), **given)  # type: ignore[arg-type]


def test_a_small_context_gets_smaller_prompts_and_a_tiny_one_is_refused() -> None:
    plan = plan_for(setting(), 1024)
    assert plan.long_prompt == 1000
    assert max(plan.lengths) == 1000
    with pytest.raises(InputError, match="at least 256"):
        plan_for(setting(model="m"), 128)


def test_what_the_user_asks_for_is_done() -> None:
    plan = plan_for(
        setting(model="m", dtype="int8", rounds=7, rates=(3.0,), prompt_lengths=(9,), seed=5), 4096
    )
    assert (plan.model, plan.dtype, plan.rounds, plan.lengths) == ("m", "int8", 7, (9,))
    assert rates_for(plan, 100.0, quick=False) == (3.0,)


def test_the_rates_stand_around_the_capacity() -> None:
    rates = rates_for(plan_for(setting(), 4096), 10.0, quick=False)
    assert min(rates) < 5.0 < max(rates) < 10.0


def test_every_round_draws_its_requests_anew_and_every_seed_others() -> None:
    def digests(seed: int) -> list[str]:
        plan = plan_for(setting(seed=seed), 4096)
        return [load.digest for _, _, load in random_loads(plan, (5.0,))]

    assert len(set(digests(0))) == 2
    assert digests(0) == digests(0)
    assert not set(digests(0)) & set(digests(1))


def test_the_arms_differ_in_roles_and_chunks_alone() -> None:
    assert [(each.name, each.colocated) for each in three_splits(2048, chunk=256, context=4096)] == [
        (PD, False), (COLOCATED, True), (CHUNKED, True),
    ]  # fmt: skip


def test_the_arm_without_chunks_takes_any_prompt_in_one_step() -> None:
    for context in (300, 4096, 100_000):
        _, colocated, _ = three_splits(2048, chunk=256, context=context)
        assert colocated.name == COLOCATED
        assert colocated.max_num_batched_tokens >= context


def test_long_prompts_are_paced_by_what_one_takes() -> None:
    plan = plan_for(setting(), 4096)
    pace = pace_for(plan, 0.5)
    load = streams_load(plan, pace, 0)
    long = [each for each in load.requests if not each.watched]
    assert [each.at for each in long] == pytest.approx([0.6, 1.7, 2.8])
    assert pace.end == pytest.approx(3.9)


def test_streams_are_taken_back_once_the_long_prompts_are_answered() -> None:
    stream, long = Planned(0.0, (1,), 9), Planned(1.0, (1,), 9, watched=False)
    assert not PACE.enough(4.9, [stream])
    assert PACE.enough(5.0, [stream])
    assert not PACE.enough(5.0, [stream, long])
    assert PACE.enough(20.0, [stream, long])  # not waited for for ever


# ---- numbers of a run


def trace(intended: float, *tokens: float, watched: bool = True, prefill: float = 0.0,
          prompt: int = 16) -> Trace:  # fmt: skip
    return Trace(intended, tokens, Timings(prefill_s=prefill), watched, prompt)


def test_gaps_count_that_end_while_long_prompts_arrive() -> None:
    traces = [
        trace(0.0, 0.1, 0.9, 1.1, 1.3, 4.3, 6.0),
        trace(1.0, 2.0, watched=False),
        trace(3.0, watched=False),
    ]
    found = stream_numbers(traces, PACE, Slo(1, 1))
    assert found["itl_max"] == pytest.approx(3000)
    assert found["itl_p50"] == pytest.approx(200)
    assert found["stream_tokens_per_s"] == pytest.approx(3 / 4)
    assert found["long_ttft_p50"] == inf  # of two, one never came


def test_a_stream_that_ran_out_spoils_the_run_and_a_stalled_one_does_not() -> None:
    assert ended_early([trace(0.0, 1.0, 2.0)], PACE, asked=3) == ""
    assert "2 tokens were done after 2.00 s of 5.00" in ended_early(
        [trace(0.0, 1.0, 2.0)], PACE, asked=2
    )
    assert ended_early([trace(0.0, 1.0, 5.5)], PACE, asked=2) == ""


def test_tokens_that_come_in_bunches_make_no_slo_that_cannot_be_met() -> None:
    bunches = trace(
        0.0, *(at + small for at in (0.1, 0.2, 0.3, 0.4) for small in (0.0, 1e-6, 2e-6))
    )
    found = idle_of(bunches, trace(0.0, 2.0))
    assert found.slo.met(bunches)
    assert (found.ttft_s, found.long_ttft_s) == (0.1, 2.0)
    steady = trace(0.0, 0.1, 0.2, 0.3)
    assert idle_of(steady, trace(0.0, 2.0)).itl_s == pytest.approx(0.1)


def test_an_arm_must_have_gone_the_way_it_is_named_after() -> None:
    pd, colocated, _ = three_splits(2048, chunk=256, context=4096)
    filled, local = trace(0, 1.0, prefill=0.1, prompt=100), trace(0, 1.0, prompt=100)
    short, gone = trace(0, 1.0, prompt=16), trace(0, prompt=100)
    check_path(pd, [filled, short, gone])
    check_path(colocated, [local, short])
    with pytest.raises(BatonError, match="1 of 2 prompts"):
        check_path(pd, [filled, local])
    with pytest.raises(BatonError, match="1 of 2 prompts"):
        check_path(colocated, [filled, local])
