"""The checker is fed wrong ledgers of every kind and reports each; a right one passes."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools.faults.check import Answer, Census, Process, answers, check, compare, outcome
from tools.faults.ledger import HOWS, Chunk, End, Event, Ledger, Sent, read, records

REFERENCE = {0: Answer("one two three", "length", 3), 1: Answer("stop here", "stop", 2)}
SENT = Sent("a", 0, 0.0, {"stream": True})
CHUNKS = [
    Chunk("a", 0.1, "one "),
    Chunk("a", 0.2, "two "),
    Chunk("a", 0.3, "three"),
    Chunk("a", 0.4, "", "length"),
]
END = End("a", 0.5, "done", 200, tokens=3)
RIGHT: list[Event] = [SENT, *CHUNKS, END]
OTHER: list[Event] = [
    Sent("b", 1, 0.0, {}),
    Chunk("b", 0.3, "stop here", "stop"),
    End("b", 0.4, "done", 200, tokens=2),
]


def test_a_right_ledger_passes() -> None:
    verdict = check([*RIGHT, *OTHER], REFERENCE, ["a", "b"])
    assert not verdict.problems
    assert verdict.requests == 2
    assert verdict.outcomes == {"ok": 2}


WRONG: dict[str, tuple[list[Event], str, str]] = {
    "a missing chunk": ([SENT, CHUNKS[0], *CHUNKS[2:], END], "wrong", "from character 5"),
    "the first chunk missing": ([SENT, *CHUNKS[1:], END], "wrong", "from character 0"),
    "the last text missing": ([SENT, *CHUNKS[:2], CHUNKS[3], END], "wrong", "from character 8"),
    "a doubled chunk": ([SENT, CHUNKS[0], *CHUNKS, END], "wrong", "from character 4"),
    "swapped chunks": ([SENT, CHUNKS[1], CHUNKS[0], *CHUNKS[2:], END], "wrong", "from character 0"),
    "a changed token": (
        [SENT, CHUNKS[0], Chunk("a", 0.2, "too "), *CHUNKS[2:], END], "wrong", "from character 5",
    ),
    "one token more": (
        [SENT, *CHUNKS[:3], Chunk("a", 0.35, " four"), CHUNKS[3], END], "wrong", "' four', not ''",
    ),
    "another finish": ([SENT, *CHUNKS[:3], Chunk("a", 0.4, "", "stop"), END], "wrong", "stop"),
    "another usage": ([SENT, *CHUNKS, replace(END, tokens=4)], "wrong", "completion_tokens 4"),
    "no usage": ([SENT, *CHUNKS, replace(END, tokens=None)], "wrong", "completion_tokens None"),
    "no finish": ([SENT, *CHUNKS[:3], END], "lost", "SILENT END"),
    "no finish and no [DONE]": (
        [SENT, *CHUNKS[:3], replace(END, how="ended")], "lost", "SILENT END",
    ),
    "no text at all": ([SENT, replace(END, how="ended")], "lost", "SILENT END"),
    "no [DONE]": ([SENT, *CHUNKS, replace(END, how="ended")], "lost", "NO DONE"),
    "two ends": ([*RIGHT, replace(END, how="error", code="worker_lost")], "lost", "TWO OUTCOMES"),
    "twice done": ([*RIGHT, END], "lost", "TWO OUTCOMES"),
    "two finishes": ([SENT, *CHUNKS, CHUNKS[3], END], "lost", "TWO OUTCOMES"),
    "an error after a finish": (
        [SENT, *CHUNKS, replace(END, how="error", code="x")], "lost", "TWO OUTCOMES",
    ),
    "a chunk after the end": ([*RIGHT, CHUNKS[0]], "lost", "TWO OUTCOMES"),
    "no end": ([SENT, *CHUNKS], "lost", "NO END"),
    "an error": (
        [SENT, CHUNKS[0], replace(END, how="error", code="worker_lost")], "lost", "error worker_lost",
    ),
    "an error status": ([SENT, End("a", 1, "error", 503)], "lost", "error 503"),
    "a cut connection": ([SENT, CHUNKS[0], replace(END, how="broken")], "lost", "broken"),
    "a hang": ([SENT, CHUNKS[0], replace(END, how="hang")], "lost", "HANG"),
    "a client that left unasked": ([SENT, replace(END, how="left")], "lost", "left"),
    "an answer to nothing": ([*CHUNKS, END], "lost", "NEVER SENT"),
    "sent twice": ([SENT, *RIGHT], "lost", "SENT TWICE"),
    "a lost id": ([], "lost", "not in the ledger"),
    "an unknown case": ([replace(SENT, case=7), *CHUNKS, END], "wrong", "no fault-free answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_ledger_is_reported(name: str) -> None:
    events, kind, words = WRONG[name]
    verdict = check([*events, *OTHER], REFERENCE, ["a", "b"])
    found = {"lost": verdict.lost, "wrong": verdict.wrong}[kind]
    assert len(found) == 1, verdict
    assert found[0].startswith("a: ")
    assert words in found[0]
    assert len(verdict.problems) >= 1
    assert verdict.requests == 2


def test_an_accepted_outcome_is_not_lost_but_its_text_is_still_compared() -> None:
    left = replace(END, how="left")
    good = check([SENT, *CHUNKS[:2], left], REFERENCE, ["a"], accepted=["left"])
    assert not good.problems
    bad = check([SENT, CHUNKS[1], left], REFERENCE, ["a"], accepted=["left"])
    assert "not the beginning" in bad.wrong[0]
    longer = check(
        [SENT, *CHUNKS[:3], Chunk("a", 1, "!"), left], REFERENCE, ["a"], accepted=["left"]
    )
    assert longer.wrong
    assert check([SENT, left], REFERENCE, ["a"], accepted=["broken"]).lost


def test_every_way_to_end_is_judged() -> None:
    found = {how: outcome(records([SENT, *CHUNKS[:2], replace(END, how=how)])["a"]) for how in HOWS}
    assert found == {
        "done": "SILENT END", "ended": "SILENT END", "error": "error 200", "broken": "broken",
        "hang": "HANG", "left": "left",
    }  # fmt: skip
    with pytest.raises(ValueError, match="how must be"):
        End("a", 0, "fine")


def test_problems_are_cut_but_counted() -> None:
    verdict = check([], REFERENCE, [f"r{i}" for i in range(9)])
    assert verdict.problems == [
        "9 lost: r0: not in the ledger; r1: not in the ledger; r2: not in the ledger; "
        "r3: not in the ledger; r4: not in the ledger and 4 more"
    ]


def test_a_reference_must_be_complete_and_agree_with_itself() -> None:
    assert answers([*RIGHT, *OTHER]) == REFERENCE
    again = [replace(event, id="c") for event in RIGHT]
    assert answers([*RIGHT, *again, *OTHER]) == REFERENCE
    with pytest.raises(ValueError, match="SILENT END"):
        answers([SENT, *CHUNKS[:3], END])
    with pytest.raises(ValueError, match="no usage"):
        answers([SENT, *CHUNKS, replace(END, tokens=None)])
    changed = [replace(each, text="x") if isinstance(each, Chunk) else each for each in again]
    with pytest.raises(ValueError, match="a second answer to case 0"):
        answers([*RIGHT, *changed])


def test_a_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    seen: list[Event] = []
    ledger = Ledger(tmp_path / "a.jsonl", seen.append)
    for event in [*RIGHT, *OTHER]:
        ledger.add(event)
    ledger.close()
    assert list(read(tmp_path / "a.jsonl")) == ledger.events == seen == [*RIGHT, *OTHER]


BEFORE = Census(
    {"router": Process(1, 20, 60.0), "decode-0": Process(2, 30, 400.0)},
    frozenset({"other"}),
    frozenset({"router.sock"}),
)


def test_a_service_as_before_is_clean() -> None:
    assert compare(BEFORE, BEFORE) == []
    router = Process(1, 22, 80.0)
    assert compare(BEFORE, replace(BEFORE, processes={**BEFORE.processes, "router": router})) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"processes": {"router": Process(1, 20, 60.0)}}, "processes ['router'], before"),
        ({"processes": {**BEFORE.processes, "orphan": Process(9, 1, 1)}}, "'orphan'"),
        ({"processes": {**BEFORE.processes, "router": Process(1, 25, 60)}}, "25 file descriptors"),
        ({"processes": {**BEFORE.processes, "router": Process(5, 25, 60)}}, "25 file descriptors"),
        ({"processes": {**BEFORE.processes, "router": Process(1, 20, 85)}}, "router has 85 MiB"),
        ({"processes": {**BEFORE.processes, "decode-0": Process(2, 30, 425)}}, "has 425 MiB"),
        ({"shared_memory": frozenset({"other", "psm_1"})}, "/dev/shm: psm_1"),
        ({"files": frozenset({"router.sock", "kv-1.sock"})}, "the run folder: kv-1.sock"),
        ({"leased": 1}, "1 KV blocks still leased"),
        ({"quarantined": 2}, "2 KV blocks still quarantined"),
        ({"running": 3}, "3 requests still running"),
        ({"waiting": 4}, "4 requests still waiting"),
    ],
)
def test_what_is_left_over_is_reported(changed: dict[str, object], words: str) -> None:
    found = compare(BEFORE, replace(BEFORE, **changed))  # type: ignore[arg-type]
    assert len(found) == 1
    assert words in found[0]
