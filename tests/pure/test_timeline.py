"""Lives put together from moments, the trace made of them, and the verdict on them."""

import gc
import json
import math
import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.lifecycle import TRANSITIONS, Event, State
from baton.timeline import STALL_S, Life, Moment, Stage, Timeline
from baton.trace import chrome_trace
from baton.verdict import Facts, verdict

WORKERS = {State.FILLING: "prefill-0.a", State.DECODING: "decode-0.b"}


def lived(*moments: Moment) -> Life:
    timeline = Timeline()
    timeline.add(moments)
    (life,) = timeline
    return life


def walk(dice: random.Random, name: str, at: float) -> list[Moment]:
    """Any legal life, as the router would tell it."""
    state, told = State.QUEUED, [Moment(name, at, "queued", tokens=7)]
    while state is not State.FINISHED and len(told) < 40:
        events = sorted(e for s, e in TRANSITIONS if s is state)
        event = dice.choice(events)
        state = TRANSITIONS[state, event]
        at += dice.choice([0.0, 0.001, 0.2, 0.9])
        tokens = len(told) if state in (State.DECODING, State.FINISHED) else 0
        handed = 0.01 if event is Event.START else 0.0
        gap = dice.choice([0.0, 0.1, 0.7, 3.0])
        worker = WORKERS.get(state, "")
        told.append(Moment(name, at, state.value, worker, tokens, handed, "note", gap_s=gap))
    return told


def test_the_first_prefill_of_a_fill_says_what_was_reused() -> None:
    timeline = Timeline()
    timeline.add(
        [
            Moment("a", 1.0, "queued", tokens=90),
            Moment("a", 1.1, "filling", "p"),
            Moment("a", 1.4, "queued", note="lost"),
            Moment("a", 1.5, "filling", "p"),
            Moment("a", 1.6, "filling", "p", 70),
            Moment("a", 2.0, "decoding", "d", handover_s=0.25, reused=64),
            Moment("a", 2.4, "finished", tokens=6, note="stop"),
        ]
    )
    (life,) = timeline.copy()
    found = [(each.name, each.reused) for each in life.stages]
    assert found == [
        ("queue", 0), ("prefill", 0), ("queue", 0), ("prefill", 64), ("prefill", 0), ("handover", 0),
        ("decode", 0),
    ]  # fmt: skip
    slices = [each for each in chrome_trace([life])["traceEvents"] if each["ph"] == "X"]
    assert [each["args"].get("reused_tokens") for each in slices].count(64) == 1


def test_a_life_is_its_stages_one_after_the_other() -> None:
    life = lived(
        Moment("a", 1.0, "queued", tokens=9),
        Moment("a", 1.1, "reserving", "d"),
        Moment("a", 1.2, "reserved", "d"),
        Moment("a", 1.3, "filling", "p"),
        Moment("a", 2.0, "decoding", "d", handover_s=0.25),
        Moment("a", 2.2, "decoding", "d", 4),
        Moment("a", 2.4, "finished", tokens=6, note="stop"),
    )
    assert life.stages == [
        Stage("queue", 1.0, 1.1), Stage("reserve", 1.1, 1.2, "d"), Stage("wait", 1.2, 1.3, "d"),
        Stage("prefill", 1.3, 1.75, "p"), Stage("handover", 1.75, 2.0, "p"),
        Stage("decode", 2.0, 2.4, "d"),
    ]  # fmt: skip
    assert (life.prompt_tokens, life.tokens, life.ended) == (9, 6, "stop")


@pytest.mark.parametrize(
    ("handed", "stages"),
    [
        (0.5, [("prefill", 0.0, 1.0), ("prefill", 1.0, 1.6), ("handover", 1.6, 2.1)]),
        (1.5, [("prefill", 0.0, 0.6), ("handover", 0.6, 2.1)]),
        (9.0, [("prefill", 0.0, 0.0), ("handover", 0.0, 2.1)]),
    ],
)
def test_the_hand_over_of_a_prompt_in_chunks_is_taken_from_all_of_them(
    handed: float, stages: list[tuple[str, float, float]]
) -> None:
    life = lived(
        Moment("a", 0.0, "filling", "p"),
        Moment("a", 1.0, "filling", "p", 10),
        Moment("a", 2.0, "filling", "p", 20),
        Moment("a", 2.1, "decoding", "d", handover_s=handed),
    )
    got = [(s.name, s.start, s.end) for s in life.stages[:-1]]
    assert got == [(name, pytest.approx(a), pytest.approx(b)) for name, a, b in stages]
    arrows = [e for e in chrome_trace([life])["traceEvents"] if e["ph"] in "sf"]
    assert [arrow["ph"] for arrow in arrows] == ["s", "f"]


def test_a_long_silence_while_decoding_is_a_stall() -> None:
    life = lived(
        Moment("a", 0.0, "decoding", "d"),
        Moment("a", 0.25, "decoding", "d", 1),
        Moment("a", 0.5, "decoding", "d", 2, gap_s=0.25),
        Moment("a", 2.5, "decoding", "d", 3, gap_s=2.0),
        Moment("a", 2.75, "finished", tokens=3, note="length", gap_s=0.25),
    )
    assert [(s.name, s.start, s.end) for s in life.stages] == [
        ("decode", 0.0, 0.5), ("stall", 0.5, 2.5), ("decode", 2.5, 2.75),
    ]  # fmt: skip


def test_tokens_that_are_told_late_are_no_stall() -> None:
    life = lived(
        Moment("a", 0.0, "decoding", "d"),
        Moment("a", 0.1, "decoding", "d", 1),
        Moment("a", 2.1, "decoding", "d", 300),
        Moment("a", 2.9, "finished", tokens=400, note="length", gap_s=STALL_S),
    )
    assert [(s.name, s.start, s.end) for s in life.stages] == [("decode", 0.0, 2.9)]


def test_who_begins_to_watch_in_the_middle_sees_the_rest() -> None:
    life = lived(Moment("a", 5.0, "filling", "p"), Moment("a", 6.0, "finished", note="abort"))
    assert [(s.name, s.start, s.end) for s in life.stages] == [("prefill", 5.0, 6.0)]


def test_only_the_last_that_ended_are_remembered() -> None:
    timeline = Timeline(remembered=3)
    timeline.add(Moment(f"r{i}", i, state) for i in range(9) for state in ("queued", "finished"))
    timeline.add([Moment("live", 9.0, "queued")])
    assert [life.request for life in timeline] == ["r6", "r7", "r8", "live"]


@pytest.mark.parametrize("seed", range(80))
def test_any_life_has_stages_without_gaps_and_a_trace_that_can_be_read(seed: int) -> None:
    dice = random.Random(seed)
    told = [walk(dice, f"r{i}", 100 + dice.random() * 3) for i in range(dice.randint(1, 12))]
    moments = sorted((m for life in told for m in life), key=lambda m: m.at)
    timeline = Timeline()
    timeline.add(moments)
    assert {life.request: life for life in timeline} == alone(moments)
    assert all(timeline.get(life.request) == life for life in timeline)
    for life in timeline:
        for stage, following in pairwise(life.stages):
            assert stage.start <= following.start == stage.end
    check_trace(json.loads(json.dumps(chrome_trace(timeline, model="demo"))))


def alone(moments: list[Moment]) -> dict[str, Life]:
    """Each request's life, built from its moments only, and never packed."""
    lives: dict[str, Life] = {}
    for moment in moments:
        life = lives.setdefault(moment.request, Life(moment.request))
        if not life.ended:
            life.add(moment)
    return lives


def test_lives_that_have_ended_are_one_piece_of_memory_each() -> None:
    dice = random.Random(1)
    timeline = Timeline()
    gc.collect()
    before = len(gc.get_objects())
    for index in range(300):
        timeline.add(walk(dice, f"r{index}", float(index)))
    ended = sum(bool(life.ended) for life in timeline)
    live = len(timeline) - ended
    assert ended > 50
    gc.collect()
    assert len(gc.get_objects()) - before < 30 * live + ended / 2


def check_trace(trace: dict) -> None:
    rows = defaultdict(list)
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in "MXCsf"
        assert event["name"]
        if event["ph"] == "M":
            named.add((event["pid"], event["tid"]))
            continue
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for place, slices in rows.items():
        assert place in named
        slices.sort()
        for (_, end), (start, _) in pairwise(slices):
            assert start >= end - 1e-3, f"slices overlap in {place}"
    arrows = {kind: [e["id"] for e in trace["traceEvents"] if e["ph"] == kind] for kind in "sf"}
    assert sorted(arrows["s"]) == sorted(arrows["f"])
    assert len(set(arrows["s"])) == len(arrows["s"])
    times = [e["ts"] for e in trace["traceEvents"] if "ts" in e]
    assert times == sorted(times)


def test_requests_that_are_there_together_have_rows_of_their_own() -> None:
    timeline = Timeline()
    timeline.add([Moment(f"r{i}", i * 0.1, "decoding", "decode-0.x") for i in range(3)])
    timeline.add([Moment(f"r{i}", 1.0 + i * 0.1, "finished", note="stop") for i in range(3)])
    slices = [e for e in chrome_trace(timeline)["traceEvents"] if e["ph"] == "X"]
    assert len({e["tid"] for e in slices}) == 3
    assert all(e["args"]["ended"] == "stop" for e in slices)


# ---- the verdict

FINE = Facts(
    good=True, prompt_tokens=200, tokens=50, queue_s=0.001, prefill_s=0.05, handover_s=0.001,
    decode_s=0.5, ttft_s=0.06,
)  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ([], "No request has ended in the last 60 s."),
        ([FINE], "Balanced: prefill is 9% of the work, the median prompt 200 tokens"),
        ([FINE, replace(FINE, good=False)], "1 of the last 2 requests did not end well"),
        ([FINE, replace(FINE, retries=1)], "lost a worker and went on"),
        ([replace(FINE, stalled_s=0.2)], "stalls: 40% of decode time"),
        ([replace(FINE, preemptions=2)], "KV pool is too small: 100%"),
        ([replace(FINE, queue_s=0.9, ttft_s=1.0)], "TTFT is bound by the queue: 90% of it"),
        ([replace(FINE, prompt_tokens=40)], "P/D would not help this traffic: prompts are no longer"),
        ([replace(FINE, prompt_tokens=2000)], "P/D helps this traffic"),
    ],
)  # fmt: skip
def test_a_verdict_says_what_it_rests_on(facts: list[Facts], words: str) -> None:
    assert words in verdict(facts)


def test_a_verdict_on_nothing_says_what_runs() -> None:
    assert verdict([], 64) == "64 requests run; none has ended in the last 60 s."
    assert verdict([], 1) == "1 request runs; none has ended in the last 60 s."
    assert verdict([], 0, 5) == "5 requests wait, none runs; none has ended in the last 60 s."


def test_one_failure_in_many_is_not_the_news() -> None:
    assert "did not end well" not in verdict([FINE] * 200 + [replace(FINE, good=False)])


SECONDS = st.floats(0, 1e4)
FACTS = st.builds(
    Facts, good=st.booleans(), prompt_tokens=st.integers(1, 10**7), tokens=st.integers(0, 10**7),
    queue_s=SECONDS, prefill_s=SECONDS, handover_s=SECONDS, decode_s=SECONDS, ttft_s=SECONDS,
    retries=st.integers(0, 3), preemptions=st.integers(0, 9), stalled_s=SECONDS,
)  # fmt: skip


@given(st.lists(FACTS, max_size=12))
def test_a_verdict_is_one_line_whatever_happened(facts: list[Facts]) -> None:
    line = verdict(facts)
    assert 0 < len(line) < 160
    assert "\n" not in line
    assert "nan" not in line


@pytest.mark.parametrize(
    ("begins", "shown"),
    [(2.0, ["queue (router)", "decode-0"]), (0.5, ["queue (router)", "decode-0.a", "decode-0.b"])],
)
def test_workers_of_one_name_at_one_time_are_shown_each_for_itself(
    begins: float, shown: list[str]
) -> None:
    """A successor, which begins when the other has ended, goes on in its row."""
    lives = [
        Life("1", [Stage("decode", 0.0, 1.0, "decode-0.a")], ended="stop"),
        Life("2", [Stage("decode", begins, begins + 1, "decode-0.b")], ended="stop"),
    ]
    events = chrome_trace(lives)["traceEvents"]
    names = [each["args"]["name"] for each in events if each["name"] == "process_name"]
    assert [each for each in names if each != "requests that decode"] == shown
