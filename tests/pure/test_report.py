"""The report: computed from the timings, nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cli.infer import slower
from baton.client.batch import Completion
from baton.offline.describe import describe_cluster, worker_states
from baton.offline.report import Tally, handed_over, report, startup_line, union, verdict
from baton.table import amount, percentile, seconds, table
from baton.timing import Stages
from baton.topology import Topology
from baton.wire.records import Timings
from tests.pure.pretend_router import info


def completion(*, start=0.0, arrivals=(0.5, 0.6, 0.6, 0.9), **timings):
    known = {
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "handover_s": 0.1,
        "decode_s": 0.5,
        "ttft_s": 0.5,
        "total_s": 0.9,
    }
    return Completion(
        index=0,
        text="t",
        token_ids=(1, 2, 3, 4),
        finish_reason="length",
        prompt_tokens=11,
        tokenize_s=0.0,
        timings=Timings(**(known | timings)),
        submitted=start,
        ended=start + 0.9,
        arrivals=tuple(start + at for at in arrivals),
    )


def tally(*completions):
    made = Tally()
    for each in completions:
        made.add(each)
    return made


def test_time_in_which_two_requests_overlap_counts_once():
    both = tally(completion(), completion(start=0.1))
    assert both.busy_s("decode") == pytest.approx(0.6)
    assert both.sums["decode"] == pytest.approx(1.0)
    assert both.wall_s == pytest.approx(1.0)


def test_the_verdict_names_the_stage_that_was_longest_at_work():
    assert verdict(tally(completion())).startswith(
        "decode bounds this job: it was busy for 56% of the 900 ms, prefill for 22%"
    )
    slow = tally(completion(prefill_s=0.6, decode_s=0.1))
    assert verdict(slow).startswith("prefill bounds this job")
    moved = tally(completion(prefill_s=0.1, decode_s=0.1, handover_s=0.5))
    assert verdict(moved).startswith("hand-over bounds this job")


def test_a_long_queue_is_worth_a_word():
    assert "larger -b" not in verdict(tally(completion()))
    waiting = verdict(tally(completion(queue_s=0.36)))
    assert waiting.endswith(
        "; requests waited 40% of their time in the queue: a larger -b lets more of them share each "
        "step."
    )
    assert "larger -b" not in verdict(tally(completion(queue_s=0.36, prefill_s=0.8, decode_s=0.1)))
    full = tally(completion(queue_s=0.36, preemptions=3))
    assert verdict(full).endswith("queue: the KV pool is too small for so many at once.")


def test_tokens_that_came_together_count_with_gaps_of_nothing():
    assert list(tally(completion()).gaps) == pytest.approx([0.1, 0.0, 0.3])


def test_the_hand_over_tells_copied_from_in_place():
    assert handed_over(tally(completion(kv_bytes=25_600_000))) == (
        "KV: 25.6 MB handed over in place, 0 bytes copied"
    )
    assert handed_over(tally(completion(kv_bytes=2_000_000, moved_bytes=1_000_000))) == (
        "KV: 2.0 MB handed over, 1.0 MB copied in whole blocks at 0.01 GB/s"
    )
    assert "decode filled its own" in handed_over(tally(completion(prefill_s=0.0)))


def test_the_whole_report_has_every_stage_and_rate():
    text = report(tally(completion(retries=2), completion(start=0.1)), load_s=3.2)
    for word in (
        *("load", "tokenize", "queue", "prefill", "hand-over", "decode", "detokenize"),
        *("execution", "total", "TTFT", "ITL", "p50", "p99"),
        *("22 prompt tokens (22/s)", "8 output tokens (8/s)", "2 retries", "bounds this job"),
    ):
        assert word in text


def test_a_run_that_did_nothing_reports_that():
    assert "nothing was generated" in report(Tally(), load_s=0.0)


def test_cached_tokens_are_told_if_there_are_any():
    plain = report(tally(completion(prefill_s=0.1)), load_s=1.0)
    assert "prefix cache" not in plain
    cached = report(tally(completion(prefill_s=0.1, cached_tokens=1)), load_s=1.0)
    assert "prefix cache: the KV of 1 prompt tokens (" in cached


def test_one_token_in_all_has_no_gap_and_still_reports():
    text = report(tally(completion(arrivals=(0.5,))), load_s=0.0)
    assert "ITL" not in text


def test_the_cluster_is_described_with_what_is_still_to_come():
    lines = describe_cluster(info(transports=("frames 1.2 GB/s",)))
    assert lines == [
        "model     pretend, float32, context 64 tokens",
        "topology  1 prefill worker on cpu (ready after 1.0 s), 1 decode worker on cpu "
        "(ready after 2.0 s)",
        "KV path   ZeroMQ frames, 1.2 GB/s",
    ]
    started = Topology(("cpu",), ("cpu", "cpu"))
    assert "1 of 2 decode workers on cpu" in describe_cluster(info(), started)[1]
    assert worker_states(info()) == "prefill 1/1, decode 1/1"


def test_startup_adds_up():
    now = iter([0.0, 1.0, 3.5])
    stages = Stages(lambda: next(now))
    stages.add("python", 0.25)
    stages.lap("checks")
    stages.lap("first token")
    assert startup_line(stages) == (
        "first token after 3.75 s: python 250 ms, checks 1.00 s, first token 2.50 s"
    )
    assert stages.total_s("never") == 0.0


def test_infer_says_which_is_slower_for_a_token():
    assert slower(completion()) == (
        "decode is slower for a token, 4.2 times: prefill 30 ms (10 tokens at once), "
        "decode 125 ms (4 tokens, one by one); 8.0 tokens/s"
    )
    assert slower(completion(prefill_s=8.0)).startswith("prefill is slower")
    assert "no prefill to compare" in slower(completion(prefill_s=0.0))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20))))
def test_the_union_covers_each_moment_once(spans):
    intervals = [(start, start + length) for start, length in spans]
    covered = {moment for start, stop in intervals for moment in range(start, stop)}
    assert union(intervals) == len(covered)


def test_percentiles_are_values_that_occurred():
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99)) == (50.0, 99.0)
    assert percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (3.8e-05, "38 µs"),
        (0.0042, "4.2 ms"),
        (0.42, "420 ms"),
        (1.534, "1.53 s"),
        (15.34, "15.3 s"),
        (125, "2 min 5 s"),
    ],
)
def test_durations_read_well(value, shown):
    assert seconds(value) == shown


def test_amounts_read_well():
    assert [amount(n) for n in (0, 512, 25_600_000, 3 * 10**12)] == [
        "0 B",
        "512 B",
        "25.6 MB",
        "3.0 TB",
    ]


def test_a_table_is_aligned():
    assert table(["a", "bb"], [["long", "1"], ["x", "22"]]) == (
        "a     bb\n--------\nlong   1\nx     22"
    )
