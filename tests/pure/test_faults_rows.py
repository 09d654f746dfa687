"""What the rows of the battery judge: each is fed a result that violates its pass line, and fails; a
right one passes."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from tests.patience import PATIENCE_MS
from tools.faults import report, rows_hostile, rows_job, rows_links, rows_load, rows_loop, rows_slow
from tools.faults.__main__ import called, run_rows
from tools.faults.battery import UNJUDGED, Battery, Result
from tools.faults.calm import MOST_FOREIGN, TICKS, Moment, busy_s, why_not_calm
from tools.faults.check import Answer, Census, Process, check, compare
from tools.faults.ledger import Chunk, End, Event, Sent
from tools.faults.soak import LEAST_THIRD, Slope, drift, judge_memory
from tools.faults.stage import Fault, Injected, account, judge_recovery

Judge = Callable[[Result], object]


def judged(judge: Judge) -> Result:
    result = Result("X", "x")
    judge(result)
    return result


def good(judge: Judge) -> None:
    assert judged(judge).passed, judged(judge)


def bad(judge: Judge, says: str) -> None:
    result = judged(judge)
    assert not result.passed
    assert says in " ".join(result.problems + result.late), result


# ---- time bars


def test_a_missed_time_bar_fails_on_a_calm_machine_and_is_a_loud_note_elsewhere() -> None:
    for why, passed in (("", False), ("--lenient-times", True)):
        result = judged(lambda r: r.bar("start", 6.0, 5.0))
        assert not result.passed, "before anybody has looked whether the machine was calm"
        result.settle(why)
        assert result.passed is passed
        assert result.late == []
    assert any(note.startswith(UNJUDGED) and "--lenient-times" in note for note in result.notes)
    how = report.about(seed=1, scale=1, seconds=1, only=())
    assert "**not judged**: times of X" in report.document([result], how)
    good(lambda r: r.bar("start", 5.0, 5.0))
    bad(lambda r: r.bar("start", float("nan"), 5.0), "nothing was measured")


def test_a_bar_without_a_figure_fails_even_where_times_are_notes() -> None:
    result = judged(lambda r: r.bar("start", float("nan"), 5.0))
    result.settle("--lenient-times")
    assert not result.passed


def test_a_machine_is_calm_if_others_used_little_of_it() -> None:
    begin = Moment(0.0, 100.0, 10.0)
    assert not why_not_calm(begin, Moment(10.0, 120.0, 30.0), lenient=False), "both cores were ours"
    foreign = MOST_FOREIGN * 10 + 0.1
    told = why_not_calm(begin, Moment(10.0, 110.0 + foreign, 20.0), lenient=False)
    assert "others used 0.26 cores" in told
    assert why_not_calm(begin, begin, lenient=True) == "--lenient-times"
    assert busy_s("cpu  1 2 4 800 1600 8 16 32 0 0\ncpu0 9 9") == pytest.approx(61 / TICKS)


# ---- recovery, census


def injected(took: float, action: str = "kill", resume_s: float | None = None) -> Injected:
    return Injected(Fault(("decode-0",), "prefill", action, resume_s), 1.0, {}, 1.0 + took)


def test_half_of_the_recoveries_are_within_the_bar() -> None:
    good(lambda r: judge_recovery(r, [injected(4.9), injected(4.9), injected(60.0)], 5.0))
    bad(lambda r: judge_recovery(r, [injected(5.1), injected(5.1), injected(1.0)], 5.0), "p50 of 3")
    never = Injected(Fault(("decode-0",), "prefill"), 1.0, {}, None)
    bad(lambda r: judge_recovery(r, [never], 5.0), "not whole again")
    good(lambda r: judge_recovery(r, [injected(18.0, "stop", 16.0)], 5.0))
    bad(lambda r: judge_recovery(r, [injected(22.0, "stop", 16.0)], 5.0), "p50 of 1")
    good(lambda r: judge_recovery(r, [injected(22.0, "wedge")], 5.0))


class Ended:
    """A service that has ended."""

    exit_code = 1


def test_a_service_that_has_ended_has_no_census_and_fails() -> None:
    bad(lambda r: account(r, Census({}), Ended()), "ended with 1")  # type: ignore[arg-type]


def test_a_spare_process_may_import_and_nothing_more() -> None:
    was = Census({"standby": Process(1, 3, 6.0), "server": Process(2, 9, 50.0)})
    for name, mib, found in (("standby", 151.0, 0), ("standby", 400.0, 1), ("server", 151.0, 1)):
        now = Census({**was.processes, name: replace(was.processes[name], memory_mib=mib)})
        assert len(compare(was, now)) == found, (name, mib)


# ---- F20


def stopped(sent: float, *events: Event) -> Judge:
    return lambda r: rows_links.judge_stop(r, [Sent("a", 0, sent, {}), *events], 10.0)


def test_one_sigterm_cuts_nothing_silently() -> None:
    cut = End("a", 11.0, "broken", 200)
    bad(stopped(9.9, Chunk("a", 10.5, "x"), cut), "1 requests were cut silently")
    bad(stopped(10.2, cut), "cut silently")
    bad(stopped(9.0, End("a", 11.0, "broken")), "sent 1.0 s before")
    good(stopped(9.9, End("a", 11.0, "broken")))
    good(stopped(10.1, End("a", 11.0, "broken")))
    good(stopped(9.0, End("a", 11.0, "error", 503, "shutting_down")))
    reference = {0: Answer("xy", "stop", 2)}
    events: list[Event] = [Sent("a", 0, 9.0, {}), Chunk("a", 9.5, "x"), cut]
    verdict = check(events, reference, ["a"], accepted=rows_links.STOPPED)
    assert verdict.lost == ["a: broken"]


# ---- F6


def test_a_crash_loop_is_told() -> None:
    right = (0.01, 503, "decode-0 ended 5 times; see /tmp/x/decode-0.log")
    good(lambda r: rows_loop.judge_refusals(r, [right] * 4))
    bad(lambda r: rows_loop.judge_refusals(r, [right] * 3), "3 requests")
    bad(lambda r: rows_loop.judge_refusals(r, [*[right] * 4, (0.01, 200, right[2])]), "not 503")
    bad(lambda r: rows_loop.judge_refusals(r, [*[right] * 4, (1.5, 503, right[2])]), "slowest 503")
    bad(lambda r: rows_loop.judge_refusals(r, [*[right] * 4, (0.1, 503, "busy")]), "do not name")
    health = (503, right[2])
    good(lambda r: rows_loop.judge_health(r, [health], 503, ("decode-0", ".log")))
    bad(lambda r: rows_loop.judge_health(r, [health, (200, "")], 503, ("decode-0",)), "1 of 2")
    bad(lambda r: rows_loop.judge_health(r, [(503, "no")], 503, ("decode-0",)), "1 of 1")
    bad(lambda r: rows_loop.judge_health(r, [health], 200, ()), "were not 200")
    bad(lambda r: rows_loop.judge_health(r, [], 200, ()), "nobody asked")


# ---- F12, B4, F21


def test_what_slow_readers_leave_in_memory_is_bounded() -> None:
    good(lambda r: rows_slow.judge_held(r, 100.0, [120.0, 163.0]))
    bad(lambda r: rows_slow.judge_held(r, 100.0, [120.0, 165.0, 101.0]), "grew by 65 MiB")
    bad(lambda r: rows_slow.judge_held(r, 100.0, [120.0, 0.0]), "was not read")
    bad(lambda r: rows_slow.judge_held(r, 100.0, []), "was not read")


@pytest.mark.parametrize("name", rows_slow.BODIES)
@pytest.mark.parametrize("key", [True, False])
def test_endless_bodies_get_the_status_of_their_kind(name: str, key: bool) -> None:
    status = rows_slow.ANSWERS.get(name, "")
    right = str(status) if key or name == rows_slow.TLS or not status else "401"

    def row(open_: int, **answered: int) -> Judge:
        counted = Counter({k.lstrip("s"): v for k, v in answered.items()})
        return lambda r: rows_slow.judge_endless(r, name, 4, open_, counted, key=key)

    good(row(0, **{f"s{right}": 4}))
    bad(row(1, **{f"s{right}": 3}), "1 of 4 open")
    bad(row(0, s200=4), "4 of 4 were not answered")
    bad(row(0, **{f"s{right}": 3, "s500": 1}), "1 of 4 were not answered")
    bad(row(0), "4 of 4 were not answered")


def test_a_pause_is_logged_in_few_lines() -> None:
    line = f"x {rows_slow.PAUSED}: y\n"
    good(lambda r: rows_slow.judge_pause(r, line + "x server.access: y\n" * 40))
    bad(lambda r: rows_slow.judge_pause(r, ""), "0 lines about the pause")
    bad(lambda r: rows_slow.judge_pause(r, line * 4), "4 lines about the pause")
    bad(lambda r: rows_slow.judge_pause(r, line + "Traceback\n" * 12), "13 lines of log")


# ---- B1, B6


def test_edges_get_the_status_they_must() -> None:
    def row(body: str, status: int, right: tuple[int, ...], took: float = 0.1) -> Judge:
        return lambda r: rows_hostile.judge_edges(r, [body], [(status, took)], right)

    ids, both = (400,), (200, 400)
    good(row('{"prompt":[-1]}', 400, ids))
    bad(row('{"prompt":[-1]}', 200, ids), "200, not (400,)")
    bad(row('{"prompt":[-1]}', 500, ids), "500, not")
    good(row('{"n":1}', 200, both))
    bad(row('{"n":1}', 500, both), "500, not")
    bad(row('{"n":1}', 0, both), "0, not")
    bad(row('{"n":1}', 200, both, took=2.1), "slowest")
    for edge in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        '"1"',
        "true",
        "[]",
        "{}",
        "1" + "0" * 400,
    ):
        bad(row(f'{{"n":{edge}}}', 200, both), "200, not (400,)")
        good(row(f'{{"n":{edge}}}', 400, both))
    good(row(f'{{"{rows_hostile.UNKNOWN}":[]}}', 200, both))
    bad(row(f'{{"{rows_hostile.UNKNOWN}":[]}}', 500, both), "500, not")


def test_every_frame_was_sent_to_every_socket_and_noticed() -> None:
    line = "router WARNING dropped a malformed message from 'x': no (899 more since the last such line)\n"
    logs = {"router.log": line}

    def row(sent: dict[str, int], logs: dict[str, str]) -> Judge:
        return lambda r: rows_hostile.judge_noise(r, sent, 1000, 2, logs)

    both = {"router.sock": 1000, "kv-1.sock": 1000}
    good(row(both, logs))
    assert judged(row(both, logs)).injected == 2000
    bad(row({"router.sock": 1000}, logs), "1 sockets were found")
    bad(row(both | {"kv-1.sock": 999}, logs), "not all of 1,000")
    bad(row(both, {"router.log": ""}), "count 0 malformed")
    bad(row(both, {"router.log": line.replace("899", "20")}), "count 21 malformed")
    bad(row(both, {"router.log": line * 10_000}), "bytes")
    was = Census({"router": Process(1, 1, 1.0)})
    for now in (Census({}), Census({"router": Process(2, 1, 1.0)})):
        bad(lambda r, now=now: rows_hostile.judge_same_processes(r, was, now), "was replaced")  # type: ignore[misc]
    good(lambda r: rows_hostile.judge_same_processes(r, was, was))


def test_frames_that_nobody_takes_are_not_counted(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rows_hostile, "TRIES", 1)
    monkeypatch.setattr(rows_hostile, "LINGER_MS", 0)
    assert rows_hostile.send(tmp_path / "nobody.sock", iter([[b"x"]] * 9), 5) == 0


def test_every_frame_arrives(tmp_path: Path) -> None:
    context = zmq.Context()
    taking = context.socket(zmq.ROUTER)
    taking.bind(f"ipc://{tmp_path}/s.sock")
    try:
        assert rows_hostile.send(tmp_path / "s.sock", iter([[b"x"]] * 9), 9) == 9
        for _ in range(9):
            assert taking.poll(PATIENCE_MS)
            taking.recv_multipart()
    finally:
        context.destroy(linger=0)


# ---- F10, F11, L6


def test_the_end_of_a_job_is_judged_even_if_the_file_is_there() -> None:
    good(lambda r: rows_job.judge_end(r, 0, done=True, said=""))
    good(lambda r: rows_job.judge_end(r, -9, done=True, said=""))
    good(lambda r: rows_job.judge_end(r, -9, done=False, said=""))
    bad(lambda r: rows_job.judge_end(r, 1, done=True, said="oh"), "exit code 1: oh")
    bad(lambda r: rows_job.judge_end(r, 0, done=False, said=""), "no file")
    bad(lambda r: rows_job.judge_end(r, -15, done=True, said=""), "exit code -15")


def test_a_full_disk_has_its_exit_code() -> None:
    writes, path = "error: cannot write x: no space left", "error: x is a link"
    good(lambda r: rows_job.judge_refused(r, 5, writes))
    good(lambda r: rows_job.judge_refused(r, 2, path))
    bad(lambda r: rows_job.judge_refused(r, 2, writes), "exit code 2, not 5")
    bad(lambda r: rows_job.judge_refused(r, 0, ""), "exit code 0, not 2")
    bad(lambda r: rows_job.judge_refused(r, 5, f"{writes} {path}"), "not one line")
    good(lambda r: rows_job.judge_stopped(r, 5, "1,234 of 2,000 saved", "1234 of 2000"))
    bad(lambda r: rows_job.judge_stopped(r, 5, "1,233 of 2,000 saved", "1234 of 2000"), "not say")
    bad(lambda r: rows_job.judge_stopped(r, 2, "1 of 2", "1 of 2"), "exit code 2, not 5")


def test_every_line_of_a_long_batch_is_compared() -> None:
    right = {"a": Answer("x", "length", 1), "b": Answer("y", "length", 1)}

    def line(index: int, text: str, tokens: int = 1) -> str:
        ids = [7] * tokens
        return json.dumps(
            {"index": index, "text": text, "finish_reason": "length", "token_ids": ids}
        )

    def row(*lines: str) -> Judge:
        return lambda r: rows_job.judge_lines(r, ["a", "b", "a"], lines, right)

    good(row(line(0, "x"), line(1, "y"), line(2, "x")))
    bad(row(line(0, "x"), line(1, "y"), line(2, "y")), "1 answers are wrong")
    bad(row(line(0, "x"), line(1, "y", 2), line(2, "x")), "1 answers are wrong")
    bad(row(line(0, "x"), line(1, "y")), "2 answers, not one for each")
    bad(row(line(0, "x"), line(2, "x"), line(1, "y")), "not one for each in order")


# ---- L2


def test_a_503_says_when_to_come_again_and_says_it_soon() -> None:
    def row(
        took: float, retry_after: int | None, count: int = 200, alone: float | None = 0.09
    ) -> Judge:
        events: list[Event] = []
        if alone is not None:
            end = End("probe-0", alone, "error", 503, "overloaded", None, 2)
            events += [Sent("probe-0", 0, 0.0, {}), end]
        for n in range(count):
            end = End(str(n), took, "error", 503, "overloaded", None, retry_after)
            events += [Sent(str(n), 0, 0.0, {}), end]
        return lambda r: rows_load.judge_refused(r, events, 1000, "probe-")

    good(row(0.9, 2))
    bad(row(1.1, 2), "201 refused, p50")
    bad(row(0.9, 2, alone=0.11), "1 of them alone")
    bad(row(0.9, 2, alone=None), "nothing was measured")
    bad(row(0.09, None), "200 answers 503 have no Retry-After")
    bad(row(0.09, 2, 11), "12 of 1000 were refused")


# ---- the soak


def test_a_slope_beyond_the_bar_or_unknown_fails() -> None:
    good(lambda r: judge_memory(r, {"main": Slope(1, 500, 0.9, 0.2)}))
    bad(lambda r: judge_memory(r, {"main": Slope(1, 500, 1.3, 0.2)}), "memory grows")
    bad(lambda r: judge_memory(r, {"main": Slope(0, 0, 0.0, float("inf"))}), "is not known")
    bad(lambda r: judge_memory(r, {}), "no memory of the main process")


def test_a_drift_of_few_points_is_no_figure() -> None:
    few = [(float(i), 0.1) for i in range(3 * LEAST_THIRD - 1)]
    bad(lambda r: r.bar("drift", drift(few)[2], 0.1), "nothing was measured")


# ---- resumed


def test_a_resumed_battery_keeps_the_rows_that_passed_with_all_their_parts() -> None:
    how = report.about(seed=3, scale=1, seconds=60, only=())
    first = [
        Result("F2", "killed", injected=4, whole_s=[0.5, 1.0], outcomes=Counter(ok=7)),
        Result("F5-hang", "hung"),
        Result("F5-router", "hung", problems=["lost one"]),
        Result("F5-late", "revived", notes=["3 late"]),
        Result("F20-drain", "drained", late=["too late"]),
    ]
    text = report.as_json(first, how)
    kept = report.passed_before(text, how, called)
    assert [each.row for each in kept] == ["F2", "F5-late"], "F5 has a part that failed"
    assert replace(kept[0], ran="") == first[0]
    assert kept[0].ran == f"commit {how.commit}, {how.began}"
    assert f"* F2, F5-late: {kept[0].ran}" in report.document(kept, how)
    later = report.as_json(kept, replace(how, commit="another", began="later"))
    assert report.passed_before(later, how, called) == kept, (
        "it says when it was run, not when kept"
    )
    for other in (replace(how, seed=4), replace(how, scale=0.5), replace(how, machine="another")):
        with pytest.raises(ValueError, match="it has"):
            report.passed_before(text, other, called)


def test_rows_that_passed_before_are_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def row(name: str) -> Callable[[Battery], list[Result]]:
        def run(battery: Battery) -> list[Result]:
            ran.append(name)
            return [Result(name, name)]

        return run

    battery = Battery(1, 1.0, tmp_path, lambda text: None)
    states: list[int] = []
    results = run_rows(
        battery,
        {name: row(name) for name in ("F2", "F3", "F5")},
        [Result("F3", "earlier")],
        lambda found: states.append(len(found)),
    )
    assert ran == ["F2", "F5"]
    assert [each.fault for each in results] == ["F2", "earlier", "F5"]
    assert states == [1, 3]
