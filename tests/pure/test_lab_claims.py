"""Findings of the claims study from made-up numbers, and its arithmetic."""

from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.lab import claims
from tools.lab.claims_clusters import Accepted, accepted, together, until
from tools.lab.claims_findings import (
    CLAIMS,
    Claim,
    Held,
    Result,
    Verdict,
    by_rounds,
    claims_table,
    findings,
    memory_result,
    verdict,
)
from tools.lab.study import Setting

RANGE = Claim("kv-cache", "KV cache", "2 to 4 times faster", 2.0, 4.0)
POINT = Claim.of("half", "half precision", "halves memory", 2.0)
GAIN = Claim.any_gain("prefix", "prefix cache", "earlier")


def result(*ratios: float, key: str = "kv-cache", beside: str = "") -> Result:
    return Result(key, ratios, 2.0, 1.0, "ms", "as defined", beside)


@pytest.mark.parametrize(
    ("claim", "ratios", "found"),
    [
        (RANGE, (5.0,), Verdict.BEATEN),
        (RANGE, (4.0,), Verdict.BEATEN),
        (RANGE, (3.9,), Verdict.REPRODUCED),
        (RANGE, (2.0,), Verdict.REPRODUCED),
        (RANGE, (1.9,), Verdict.NOT),
        (RANGE, (1.0, 9.0, 3.0), Verdict.REPRODUCED),  # the median
        (POINT, (2.0,), Verdict.REPRODUCED),
        (POINT, (1.95,), Verdict.REPRODUCED),
        (POINT, (1.85,), Verdict.NOT),
        (POINT, (2.2,), Verdict.BEATEN),
        (GAIN, (100.0,), Verdict.REPRODUCED),  # no number, nothing to beat
        (GAIN, (1.02,), Verdict.NOT),
        (GAIN, (0.5,), Verdict.NOT),
        (RANGE, (), Verdict.UNMEASURED),
    ],
)
def test_a_claim_is_beaten_reproduced_or_not(
    claim: Claim, ratios: tuple[float, ...], found: Verdict
) -> None:
    assert verdict(claim, result(*ratios)) is found


def test_a_claim_that_rests_on_few_requests_gets_no_verdict() -> None:
    few = by_rounds("kv-cache", [(10.0, 2.0)] * 3, "ms", "d", samples=49)
    assert verdict(RANGE, few) is Verdict.FEW
    assert (
        verdict(RANGE, by_rounds("kv-cache", [(10.0, 2.0)], "ms", "d", samples=50))
        is Verdict.BEATEN
    )
    lines = findings({"kv-cache": few})
    assert "1 no verdict: KV cache" in lines[0]
    assert (
        "no verdict, as 49 timed on a side are fewer than 50; 5.00 times, better in 3 of 3"
        in lines[1]
    )
    assert claims_table({"kv-cache": few}).rows[0][5:7] == ("49 in 3 rounds", "no verdict")


def test_without_a_result_nothing_is_claimed() -> None:
    assert verdict(RANGE, None) is Verdict.UNMEASURED
    assert findings({}) == ["No claim could be measured."]


def test_a_ratio_is_taken_within_its_round() -> None:
    faster = by_rounds("kv-cache", [(10.0, 5.0), (100.0, 50.0), (9.0, 3.0)], "ms", "d", samples=99)
    assert faster.ratios == (2.0, 2.0, 3.0)
    assert (faster.ratio, faster.before, faster.after) == (2.0, 10.0, 5.0)
    more = by_rounds("batching", [(10.0, 50.0)], "tokens/s", "d", samples=99, more_is_better=True)
    assert more.ratio == 5.0


def test_the_table_has_a_line_for_every_claim_measured_or_not() -> None:
    table = claims_table({"kv-cache": result(3.0, 3.5)})
    assert [row[0] for row in table.rows] == [claim.title for claim in CLAIMS]
    assert table.rows[0][4:7] == ("3.25 (3.00 .. 3.50)", "a count, exact", "reproduced")
    assert table.rows[1][4:7] == ("-", "-", "not measured")
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_findings_count_and_name_what_holds_and_what_does_not() -> None:
    lines = findings(
        {
            "kv-cache": result(5.0, beside="seen beside it."),
            "half": result(2.0, key="half"),
            "int8": result(2.4, key="int8"),
            "speculation, ordinary": result(0.8, key="speculation, ordinary"),
        }
    )
    assert "Of 4 claims measured here 1 beaten: KV cache (5.00 times" in lines[0]
    assert "1 reproduced: half precision (2.00 times" in lines[0]
    assert "2 not reproduced: INT8 (2.40 times" in lines[0]
    assert lines[1].startswith("speculation, ordinary text is worse than without here: 0.800 times")
    assert lines[2].startswith("Not measured: compiled program (ours), torch.compile,")
    assert lines[3] == "KV cache: seen beside it."
    assert len(lines) == 4


def test_where_all_is_measured_nothing_is_called_missing() -> None:
    lines = findings({claim.key: result(10.0, key=claim.key) for claim in CLAIMS})
    assert not any("Not measured" in line or "worse" in line for line in lines)


def test_claims_are_ranges_above_no_change() -> None:
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    assert all(1 < claim.low < claim.high <= inf for claim in CLAIMS)


def test_a_text_that_its_prompt_holds_takes_fewer_steps() -> None:
    text = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    found = accepted([*text, 1, *text[:3]], text[3:])
    assert found == Accepted(tokens=7, steps=2, guessed=5, stood=5)
    assert "5 of 5 draft tokens were accepted (100%)" in str(found)


def test_a_text_without_repetition_takes_a_step_for_each_token() -> None:
    found = accepted([1, 2, 3], [4, 5, 6, 7])
    assert found == Accepted(tokens=4, steps=4, guessed=0, stood=0)
    assert "0%" in str(found)


@given(st.lists(st.integers(0, 2), min_size=2), st.lists(st.integers(0, 2), min_size=1))
def test_steps_and_guesses_that_stood_add_up_to_the_tokens(
    prompt: list[int], answer: list[int]
) -> None:
    found = accepted(prompt, answer)
    assert found.steps + found.stood == found.tokens == len(answer)
    assert found.stood <= found.guessed
    assert together([found, found]).steps == 2 * found.steps


def test_an_answer_ends_where_its_text_does() -> None:
    assert until(0, (4, 5, 0, 6)) == (4, 5)
    assert until(0, (4, 5)) == (4, 5)


def test_memory_is_weights_and_kv_and_rss_stands_beside() -> None:
    full = Held("float32", 400, 100, 64, 1000)
    less = Held("int8", 100, 50, 64, 500)
    found = memory_result("int8", full, less)
    assert found.ratios == (500 / 150,)
    assert "(4.00 times)" in found.beside
    assert "RSS 1.00 kB to 0.500 kB (2.00 times" in found.beside
    unread = memory_result("int8", full, Held("int8", 100, 50, 64, None))
    assert "RSS" not in unread.beside


def test_claims_measured_by_requests_have_enough_of_them_unless_the_user_wants_fewer() -> None:
    full = claims.sizes_for(Setting(Path()), 1024)
    assert full.texts * claims._rounds(full, full.texts) >= 50
    assert claims._rounds(full, 1) >= 50
    few = claims.sizes_for(Setting(Path(), rounds=2), 1024)
    assert claims._rounds(few, few.texts) == claims._rounds(few, 1) == 2
