"""Findings of baseline, batching and KV cache studies from made-up numbers, negative ones too."""

import dataclasses
import re

import pytest

from tools.lab import baseline_findings as baseline
from tools.lab import batching_findings as batching
from tools.lab import kv_findings as kv
from tools.lab.phrasing import change


def cell(batch: int, rates: tuple[float, ...], **other: object) -> batching.Cell:
    made = batching.Cell(
        batch=batch, window_ms=10.0, load=batching.BURST, queueing=(10.0, 30.0) * 30,
        execution=(100.0, 100.0) * 30, total=(110.0, 130.0) * 30, requests_per_s=(1.0,),
        tokens_per_s=rates, cores={"router": 0.1, "decode-0": 0.9}, peak_cores=1.5,
    )  # fmt: skip
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


def test_batching_that_pays_is_said_with_its_ratio_and_its_rounds() -> None:
    said = batching.verdict([cell(1, (50.0, 100.0)), cell(8, (150.0, 320.0))])
    assert "**Batching pays**" in said
    assert "batch 8 makes 235 tokens/s, 3.10 times (3.00 to 3.20 in the rounds)" in said


def test_batching_that_buys_less_than_the_threshold_does_not_pay() -> None:
    said = batching.verdict([cell(1, (100.0,)), cell(8, (104.0,)), cell(16, (70.0,))])
    assert "**Batching does not pay here**" in said
    assert "no batch size brings more than 5% over batch 1" in said
    assert "the best, batch 8, has 1.04 times" in said


def test_below_fifty_requests_batching_gets_no_verdict() -> None:
    few = {"total": (110.0, 130.0) * 4}
    cells = [cell(1, (100.0,), **few), cell(8, (300.0,), **few)]
    said = batching.verdict(cells)
    assert "**No verdict on batching**" in said
    assert "8 requests in 1 window of 8.00 s a cell" in said
    assert "4 of 8 (50%; 95% interval 21.5% to 78.5%) of its requests were done sooner" in said
    assert "Batching pays" not in said
    assert "No verdict on a knee" in batching.knee(cells)
    waits = [window(0, "burst", 50, 100), window(50, "burst", 40, 120)]
    told = batching.window([dataclasses.replace(each, **few) for each in waits])
    assert "no verdict" in told
    assert "gained" not in told


def test_a_verdict_on_batching_says_what_it_rests_on() -> None:
    said = batching.verdict([cell(1, (50.0,)), cell(8, (150.0,))])
    assert "60 requests in 1 window of 60.0 s a cell; threshold 5%" in said


def test_rounds_that_disagree_are_called_noise() -> None:
    said = batching.verdict([cell(1, (100.0, 100.0)), cell(8, (50.0, 300.0))])
    assert "noise" in said
    assert "noise" not in batching.verdict([cell(1, (100.0, 100.0)), cell(8, (200.0, 300.0))])


def test_a_ratio_compares_within_rounds_not_across_them() -> None:
    slow_minute = batching.ratio(cell(1, (10.0, 100.0)), cell(8, (30.0, 300.0)))
    assert (slow_minute.middle, slow_minute.least, slow_minute.most) == (3.0, 3.0, 3.0)


def test_a_trade_names_what_was_given_and_what_was_bought() -> None:
    slower = cell(8, (300.0,), execution=(200.0,) * 60, queueing=(1.0,) * 60, total=(201.0,) * 60)
    (said,) = batching.trades([cell(1, (100.0,)), slower])
    assert "throughput x 3.00" in said
    assert "execution rose 2.00 times (100 to 200 ms)" in said
    assert "queueing fell to 0.0500 of it (20.0 to 1.00 ms)" in said
    assert "mean latency rose 1.68 times (120 to 201 ms) and P95 rose 1.55 times" in said


def test_the_knee_is_where_a_doubling_buys_too_little() -> None:
    cells = [cell(1, (100.0,)), cell(4, (300.0,)), cell(8, (330.0,)), cell(16, (335.0,))]
    assert "The knee is at batch 4" in batching.knee(cells)
    assert (
        "brings 10% more tokens/s, less than 20% (60 requests in 1 window of 60.0 s a cell)"
        in batching.knee(cells)
    )


def test_a_step_of_two_doublings_is_judged_by_each_of_them() -> None:
    # 1.39 times in two doublings is 18 % each: too little; 1.5 times is 22 % each
    assert "The knee is at batch 1" in batching.knee([cell(1, (100.0,)), cell(4, (139.0,))])
    assert "no knee up to batch 4" in batching.knee([cell(1, (100.0,)), cell(4, (150.0,))])


def window(ms: float, load: str, queued: float, rate: float) -> batching.Cell:
    total = (queued + 100.0,) * 60
    return cell(8, (rate,), window_ms=ms, load=load, queueing=(queued,) * 60, total=total)


def test_the_window_under_staggered_arrivals_is_said_to_cost_queueing_alone() -> None:
    said = batching.window([window(0, "staggered", 1, 20), window(50, "staggered", 51, 20)])
    assert "cost 50.0 ms of queueing a request (1.00 to 51.0 ms" in said
    assert "it cannot gain throughput" in said


def test_the_window_under_a_burst_is_said_to_buy_or_not() -> None:
    bought = batching.window([window(0, "burst", 50, 100), window(50, "burst", 40, 120)])
    assert "cost no queueing" in bought
    assert "gained throughput: 1.20 times" in bought
    nothing = batching.window([window(0, "burst", 50, 100), window(50, "burst", 90, 101)])
    assert "cost 40.0 ms of queueing a request" in nothing
    assert "gained nothing: 1.01 times" in nothing


def test_one_cell_alone_gives_no_comparison() -> None:
    assert batching.findings([cell(4, (1.0,))], [cell(4, (1.0,))], 2) == [
        "Nothing to compare: only one batch size and one window were measured."
    ]


def test_all_loads_and_both_variations_are_concluded_upon() -> None:
    def both(**other: object) -> list[batching.Cell]:
        return [cell(1, (100.0,), **other), cell(8, (300.0,), **other)]

    windows = [window(w, load, w, 100) for w in (0, 50) for load in batching.LOADS]
    said = batching.findings([*both(), *both(load=batching.STAGGERED)], windows, 2)
    assert len(said) == 7
    assert any("keeps 50% of 2 cores busy at batch 1" in each for each in said)
    assert any("a second of one core makes 100 and 300 tokens" in each for each in said)


def test_tables_of_batching_have_a_line_for_each_cell() -> None:
    cells = [cell(1, (100.0,)), cell(8, (300.0,), gpu_percent=40.0)]
    table = batching.latency_table("Batch size", cells, 2)
    assert [row[0] for row in table.rows] == ["1", "8"]
    assert {len(row) for row in table.rows} == {len(table.header)}
    usage = batching.usage_table(cells)
    assert usage.header[-1] == "GPU"
    assert [row[-1] for row in usage.rows] == ["", "40%"]
    assert {len(row) for row in usage.rows} == {len(usage.header)}
    assert len(batching.request_table(cells[0], 1).rows) == 1


# ---- KV cache


def point(
    length: int, use: bool, token_s: float, prefill_s: float = 0.0, tokens: int = 50
) -> kv.Point:
    times = (token_s,) * tokens
    return kv.Point(length, use, prefill_s + sum(times), prefill_s, times, 10, 0, None, (1, 2))


def test_the_cache_pays_from_the_length_on_from_which_every_longer_one_is_faster() -> None:
    slow, fast = (16, 0.010), 0.010
    points = [point(*slow[:1], False, slow[1]), point(16, True, fast)]
    for length, token_s in ((64, 0.012), (128, 0.025), (256, 0.05)):
        points += [point(length, False, token_s), point(length, True, fast)]
    said = kv.verdict(kv.pairs(points))
    assert (
        "**The cache pays** from 64 tokens on (at least 1.1 times as fast; 50 timed tokens a cell)"
        in said
    )
    assert "half of the time or more from 128 tokens on" in said


def test_few_timed_tokens_give_no_verdict_on_the_cache() -> None:
    points = [point(64, False, 0.02, tokens=6), point(64, True, 0.01, tokens=6)]
    said = kv.verdict(kv.pairs(points))
    assert "**No verdict on the cache**: 6 timed tokens a cell are fewer than 50" in said
    assert "6 of 6 (100%; 95% interval 61% to 100%) tokens with the cache were faster" in said


def test_a_cache_that_is_not_faster_at_the_longest_prompt_does_not_pay() -> None:
    points = [point(16, False, 0.02), point(16, True, 0.01), point(64, False, 0.01),
              point(64, True, 0.01)]  # fmt: skip
    said = kv.verdict(kv.pairs(points))
    assert "**The cache does not pay here**" in said
    assert "the best is 2.00 times at 16 tokens" in said


def test_prefill_counts_against_the_cache() -> None:
    points = [point(64, False, 0.01), point(64, True, 0.005, prefill_s=0.25)]
    assert kv.pairs(points)[0].speedup == pytest.approx(1.0)


def test_a_length_measured_one_way_alone_is_compared_with_nothing() -> None:
    assert kv.pairs([point(64, True, 0.01), point(32, False, 0.01)]) == []
    assert "nothing to compare" in kv.saving([])[0]


def test_different_answers_with_and_without_the_cache_are_told() -> None:
    other = dataclasses.replace(point(64, True, 0.01), tokens=(1, 3))
    said = kv.same(kv.pairs([point(64, False, 0.01), other]))
    assert "**different tokens** at 64" in said[0]
    assert "same tokens" in kv.same(kv.pairs([point(8, False, 1.0), point(8, True, 1.0)]))[0]


def test_growth_is_named_with_its_error() -> None:
    points = [point(n, False, 0.001 + 1e-5 * n) for n in (64, 128, 256, 512)]
    (said,) = kv.growth("A token", points, [p.token_s for p in points])
    assert said.startswith(
        "A token grows linearly with the prompt: 1.00 ms +10.0 µs a prompt token"
    )
    assert re.search(r"R² 1\.00, worst point (0|below 0\.01)% off; as a power law x\^", said)


def test_growth_that_no_curve_fits_is_said_to_be_so() -> None:
    points = [point(n, False, s) for n, s in ((64, 0.1), (128, 0.01), (256, 0.3), (512, 0.02))]
    (said,) = kv.growth("A token", points, [p.token_s for p in points])
    assert "no constant, line or parabola that grows comes within 10%" in said
    (few,) = kv.growth("A token", points[:2], [0.1, 0.01])
    assert "2 lengths are too few" in few


MEMORY = kv.Memory(
    token_bytes=1000, block_tokens=16, weight_bytes=500_000, free_bytes=4_000_000, context=1024
)


def test_where_the_cache_outweighs_the_weights_is_counted_exactly() -> None:
    said = kv.weight(MEMORY)
    assert "from 500 tokens on: batch 1 x 500 tokens; batch 8 x 63 tokens" in said[1]
    assert "4,000 tokens of cache, 3 sequences of 1,024" in said[2]


def test_a_memory_too_small_for_one_sequence_is_said_to_be_eaten() -> None:
    said = kv.weight(dataclasses.replace(MEMORY, free_bytes=1_000_000))
    assert "0 sequences of 1,024: not even one" in said[2]


def test_a_model_whose_weights_cannot_be_counted_is_not_guessed() -> None:
    assert not any(
        "weights (" in s for s in kv.weight(dataclasses.replace(MEMORY, weight_bytes=None))
    )


def test_sequences_take_whole_blocks() -> None:
    assert kv.sequence_bytes(17, MEMORY) == 32_000
    assert kv.capacity_table(MEMORY).rows == (("1,024", "1.02 MB", "3"),)


# ---- baseline


def run(prefill: float, decode: float, prompt: int = 11, new: int = 10) -> baseline.Run:
    stages = dict.fromkeys(baseline.STAGES, 0.0) | {"prefill": prefill, "decode": decode}
    return baseline.Run(stages, prefill + decode, prefill, prompt, new)


def test_the_slower_of_prefill_and_decode_is_named_for_a_token_and_in_all() -> None:
    said = baseline.slower([run(0.01, 0.1)])
    assert "decode is slower per token, 10.0 times" in said
    assert "In total, decode takes longer: prefill 10.0 ms, decode 100 ms" in said
    long_prompt = baseline.slower([run(2.0, 0.1, prompt=201)])
    assert "the same per token (within 5%)" in long_prompt
    assert "In total, prefill takes longer" in long_prompt
    assert "prefill is slower per token, 2.00 times" in baseline.slower([run(0.2, 0.1)])


def test_without_prefill_there_is_nothing_to_compare() -> None:
    assert "no prefill to compare" in baseline.slower([run(0.0, 0.1, prompt=1)])


def test_the_stage_table_is_of_medians_and_leaves_detokenizing_out_of_no_line() -> None:
    table = baseline.stage_table(1.5, [run(0.01, 0.1), run(0.03, 0.2), run(0.02, 0.3)])
    lines = {row[0]: row[1:] for row in table.rows}
    assert lines["prefill"][:4] == ("3", "20.0", "10.0", "30.0")
    assert lines["load (until the workers are ready)"][1] == "1,500"
    assert "detokenize (overlaps decode)" in lines
    assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize(
    ("mfu", "mbu", "expected"),
    [
        (0.02, 0.7, "nearer to the limit of memory: 70% of it, 2% of that of arithmetic"),
        (0.8, 0.3, "nearer to the limit of arithmetic: 80% of it"),
        (0.02, 1.3, "Above 100%"),
        (0.02, 0.2, "Below half of both"),
    ],
)
def test_what_bounds_a_stage_is_the_limit_it_is_nearer_to(
    mfu: float, mbu: float, expected: str
) -> None:
    assert expected in baseline.bound(baseline.Share("decode", mfu, mbu, 1.0, 1.0))


def test_changes_within_the_threshold_are_no_changes() -> None:
    assert change(100, 104) == "stayed the same"
    assert change(100, 90) == "fell to 0.900 of it"
    assert change(100, 0.5) == "fell below 0.01 of it"
    assert change(0, 5) == "rose from zero"
    assert change(0, 0) == "stayed at zero"


def test_where_there_is_no_proc_the_use_of_the_cores_is_not_made_up() -> None:
    cells = [cell(1, (1.0,), cores={}), cell(2, (2.0,), cores={})]
    assert "unknown here" in batching.utilisation(cells, 2)
    assert batching.latency_table("t", cells, 2).rows[0][-1] == ""
