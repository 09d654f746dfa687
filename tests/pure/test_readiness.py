"""Whether requests can be served, what is missing, and who fills meanwhile."""

import dataclasses

import pytest

from baton.kv.grant import Grant
from baton.lifecycle import State
from baton.timeline import short_name
from baton.wire import messages as msg
from baton.wire.codec import decode, encode
from baton.wire.membership import BEAT_S
from baton.wire.node import Effect, To
from baton.wire.records import ProcessDown
from router.readiness import FILLING_THEMSELVES, MAX_SUPERVISORS, PREFILL_GRACE_S, Readiness
from router.ways import MOST_S
from router.workers import ENGINE, WorkerRegistry
from tests.pure.desk import RULES, Desk, sent
from tests.pure.engine_town import EngineTown
from tests.pure.test_workers import SILENT, attach, hello, members
from tests.pure.town import Town, calm_answer

DECODE_DOWN = ProcessDown(
    "decode-0", "decode", 6, "exit code 1: cannot map the pool", 16.0, "/tmp/b/logs/decode-0.log"
)
PREFILL_DOWN = ProcessDown("prefill-0", "prefill", 1, "signal 9", 0.0, "/tmp/b/logs/prefill-0.log")
PREFILL_DIED = (
    "prefill-0 died with signal 9; it is started again now; log: /tmp/b/logs/prefill-0.log"
)


def judged(*workers: str, colocated: bool = False) -> tuple[WorkerRegistry, Readiness]:
    made = members(*workers)
    return made, Readiness(made, colocated=colocated)


def test_what_is_missing_at_the_start_is_said_in_words() -> None:
    made, ready = judged()
    assert ready.missing(0.0) == "no decode worker has joined"
    made.join(hello("d1"), 0.0)
    assert ready.missing(0.0) == "no prefill worker has joined"
    made.join(hello("p1"), 0.0)
    assert ready.missing(0.0) == "no prefill worker is attached to a decode worker yet"
    attach(made, "p1", "d1")
    assert (ready.missing(0.0), ready.degraded(0.0)) == ("", "")


def test_engines_that_all_leave_are_named() -> None:
    made = members()
    ready = Readiness(made, colocated=False)
    for name in ("e1.1", "e2.1"):
        made.join(hello(name, role=ENGINE, blocks=4), 0.0)
    assert ready.missing(0.0) == ""
    for number, missing in enumerate(["", "no engine worker accepts requests: e1, e2 leaving"], 1):
        member = made.get(f"e{number}.1")
        assert member is not None
        made.leaves(member)
        assert ready.missing(0.0) == missing
    made.remove("e1.1", proven_dead=True)
    assert ready.missing(0.0) == "no engine worker accepts requests: e2 leaving"


def test_a_cluster_whose_engines_all_leave_says_so_to_its_clients() -> None:
    town = EngineTown()
    town.run(lambda: town.router.info(town.now).ready)
    for name in town.workers("engine"):
        town.router.handle(name, msg.Leaving(30.0), town.now)
    info = town.router.info(town.now)
    assert not info.ready
    assert info.waiting_for.startswith("no engine worker accepts requests: engine-0, engine-1")
    assert info.degraded == ""
    assert [each.state for each in info.workers] == ["leaving", "leaving"]
    assert decode(encode(info)) == info


def test_a_colocated_cluster_waits_for_no_prefill_worker() -> None:
    _, ready = judged("d1", colocated=True)
    assert (ready.missing(0.0), ready.degraded(0.0)) == ("", "")
    assert ready.fill_themselves(0.0)


def test_a_cluster_waits_for_its_prefill_workers_for_a_limited_time() -> None:
    _, ready = judged("d1")
    before = PREFILL_GRACE_S - 0.1
    assert (ready.missing(before), ready.fill_themselves(before)) == (
        "no prefill worker has joined", False
    )  # fmt: skip
    assert (ready.missing(PREFILL_GRACE_S), ready.fill_themselves(PREFILL_GRACE_S)) == ("", True)
    assert ready.degraded(PREFILL_GRACE_S) == f"no prefill worker has joined; {FILLING_THEMSELVES}"


def test_it_waits_no_longer_once_they_are_reported_down() -> None:
    _, ready = judged("d1")
    ready.supervised("boss", (PREFILL_DOWN,), 1.0)
    assert ready.missing(1.0) == ""
    assert ready.degraded(1.0) == f"no prefill worker runs: {PREFILL_DIED}; {FILLING_THEMSELVES}"


def test_a_prefill_worker_that_cannot_write_leaves_the_cluster_degraded() -> None:
    made, ready = judged("d1", "p1")
    prefill = made.get("p1")
    assert prefill is not None
    made.way_lost(prefill, msg.AttachFailed("d1", "d1/0", "no shared memory"), 0.0, moved=0)
    assert ready.missing(0.0) == ""
    why = "p1 cannot write to d1: no shared memory"
    assert ready.degraded(0.0) == f"{why}; {FILLING_THEMSELVES}"


def test_the_death_of_the_last_prefill_worker_degrades_the_cluster_at_once() -> None:
    made, ready = judged("d1", "p1")
    attach(made, "p1", "d1")
    made.remove("p1", proven_dead=True)
    assert ready.missing(0.0) == ""
    assert ready.degraded(0.0) == f"no prefill worker has joined; {FILLING_THEMSELVES}"
    assert ready.fill_themselves(0.0)


def test_it_fills_remotely_again_as_soon_as_a_prefill_worker_is_about_to_attach() -> None:
    made, ready = judged("d1", "p1")
    attach(made, "p1", "d1")
    made.remove("p1", proven_dead=True)
    made.join(hello("p2"), 0.0)
    assert not ready.fill_themselves(0.0)
    assert not made.prefill_reaches("d1", 0.0)
    attach(made, "p2", "d1")
    assert made.prefill_reaches("d1", 0.0)


def test_silence_is_not_death_and_readiness_follows_death() -> None:
    made, ready = judged("d1", "p1")
    attach(made, "p1", "d1")
    assert ready.missing(SILENT + 5.0) == ""
    made.heard("d1", SILENT + 5.0)
    silent = "prefill worker answers: p1 is silent for 8 s (at a long step, or stalled)"
    assert ready.degraded(SILENT + 5.2) == f"no {silent}; {FILLING_THEMSELVES}"
    assert ready.degraded(SILENT + 5.2) == ready.degraded(SILENT + 5.9)
    for worker in ("d1", "p1"):
        made.remove(worker, proven_dead=False)
    assert ready.missing(SILENT + 6.0) == "no decode worker has joined"


def test_only_the_boot_is_left_out_of_a_workers_name() -> None:
    made, ready = judged("d.10.0.0.7.ab12")
    for member in made:
        made.leaves(member)
    assert ready.missing(0.0) == "no decode worker accepts requests: d.10.0.0.7 leaving"
    assert [short_name(name) for name in ("10.0.0.7.ab12", "decode-0.ab", "bare", "")] == [
        "10.0.0.7", "decode-0", "bare", "",
    ]  # fmt: skip


def test_workers_that_leave_are_not_counted_on() -> None:
    made, ready = judged("d1", "p1")
    attach(made, "p1", "d1")
    for member in made:
        made.leaves(member)
    assert ready.missing(0.0) == "no decode worker accepts requests: d1 leaving"
    assert [info.state for info in made.infos(0.0)] == ["leaving", "leaving"]
    assert not made.prefill_reaches("d1", 0.0)


def test_a_crash_loop_is_told_with_its_reason_its_log_and_its_next_start() -> None:
    _, ready = judged()
    ready.supervised("boss", (DECODE_DOWN,), 100.0)
    text = (
        "no decode worker runs: decode-0 died 6 times within 60 s, the last time with exit code 1: "
        "cannot map the pool; it is started again within {} s; log: /tmp/b/logs/decode-0.log"
    )
    assert ready.missing(100.0) == text.format(16)
    assert ready.missing(104.2) == text.format(12)
    changes = {ready.missing(100.0 + tick / 10) for tick in range(100)}
    assert len(changes) <= 11  # once a second at most
    assert "started again now" in ready.missing(140.0)


def test_a_report_is_withdrawn_by_an_empty_one_and_by_the_end_of_its_sender() -> None:
    _, ready = judged()
    ready.supervised("boss", (DECODE_DOWN,), 0.0)
    ready.supervised("other", (DECODE_DOWN,), 0.0)
    ready.supervised("boss", (), 1.0)
    assert "decode-0 died" in ready.missing(1.0)
    ready.forget("other")
    assert ready.missing(1.0) == "no decode worker has joined"
    for index in range(100):
        ready.supervised(f"client-{index}", (DECODE_DOWN,), 1.0)
    assert len(ready._reports) == MAX_SUPERVISORS


def test_the_death_of_one_of_two_degrades_and_its_reason_is_told() -> None:
    made, ready = judged("d1", "p1")
    attach(made, "p1", "d1")
    ready.supervised("boss", (dataclasses.replace(DECODE_DOWN, name="decode-1"), PREFILL_DOWN), 0.0)
    assert ready.missing(0.0) == ""
    told = ready.degraded(0.0)
    assert told.startswith(f"{PREFILL_DIED}; decode-1 died 6 times")
    assert FILLING_THEMSELVES not in told


# ---- the router


def info(desk: Desk) -> msg.ClusterInfo:
    return desk.router.info(desk.now)


def starts(effects: list[Effect]) -> list[msg.Start]:
    return [e.message for e in effects if isinstance(e, To) and isinstance(e.message, msg.Start)]


def test_the_router_passes_reports_on_and_forgets_those_of_clients_that_are_gone() -> None:
    desk = Desk("d1", "p1")
    assert desk.hear("boss", msg.Supervised((PREFILL_DOWN,))) == []
    assert info(desk).degraded == PREFILL_DIED
    desk.hear("boss", msg.Unreachable("boss"))
    assert (info(desk).ready, info(desk).degraded) == (True, "")
    desk.hear("d1", msg.Exited("d1"))
    desk.hear("boss", msg.Supervised((DECODE_DOWN,)))
    assert not info(desk).ready
    assert "cannot map the pool" in info(desk).waiting_for
    assert info(desk).degraded == ""


def test_a_prefill_worker_that_could_not_attach_tries_again_later_and_later() -> None:
    desk = Desk("d1")
    desk.join("p1")
    again = []
    while desk.now < 40.0:
        desk.hear("p1", msg.Heartbeat("p1/0", 1))
        desk.hear("d1", msg.Heartbeat("d1/0", 1))
        if not desk.now or sent(desk.step(), msg.Attach):
            again.append(desk.now)
            desk.hear("p1", msg.AttachFailed("d1", "d1/0", "too many open files"))
            assert FILLING_THEMSELVES in info(desk).degraded
        desk.now += BEAT_S / 4
    assert again == [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 25.5, 35.5]
    desk.hear("p1", msg.Attached("d1", "d1/0", "shm", 0.0, ""))
    assert info(desk).degraded == ""


def test_a_prefill_worker_that_names_no_decode_worker_of_ours_attaches_to_nothing() -> None:
    desk = Desk("d1", "p1")
    for name in ("p2", "d9"):
        desk.join("p2")
        desk.hear("p1", msg.AttachFailed(name, f"{name}/0", "no"))
        assert desk.hear("p1", msg.Attached(name, f"{name}/0", "shm", 0.0, "")) == []
        desk.hear("p2", msg.Exited("p2"))
        desk.now += MOST_S
        for worker in ("d1", "p1"):
            desk.hear(worker, msg.Heartbeat(f"{worker}/0", 1))
        assert not sent(desk.step(), msg.Attach)
    assert info(desk).degraded == ""


def test_a_supervisor_that_reported_is_sent_heartbeats_so_that_its_end_is_noticed() -> None:
    """A killed one withdraws nothing, and nothing else may ever be sent to it."""
    desk = Desk("d1", "p1")
    desk.hear("boss", msg.Supervised((PREFILL_DOWN,)))
    for _ in range(2):
        desk.now += BEAT_S
        assert "boss" in [peer for peer, _ in sent(desk.step(), msg.Heartbeat)]
    desk.hear("boss", msg.Supervised(()))
    desk.now += BEAT_S
    assert "boss" not in [peer for peer, _ in sent(desk.step(), msg.Heartbeat)]


def test_requests_with_blocks_start_without_a_receipt_when_the_last_prefill_worker_dies() -> None:
    desk = Desk(rules=dataclasses.replace(RULES, window_s=100.0, batch_size=8))
    desk.submit("a")
    desk.submit("b")
    desk.step()
    desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    assert not starts(desk.step())  # waits for the other, to be filled together
    desk.hear("p1", msg.Exited("p1"))
    assert [(start.run, start.receipt) for start in starts(desk.step())] == [("a#0", None)]
    desk.submit("c")
    assert sent(desk.step(), msg.Reserve)
    for name in "bc":
        desk.hear("d1", msg.Reserved(Grant("d1", "d1/0", desk.run(name), 2, (1,))))
    assert len(starts(desk.step())) == 2
    assert desk.state("c") is State.DECODING


def test_a_request_waits_for_its_prefill_worker_while_the_cluster_starts() -> None:
    desk = Desk("d1")
    desk.submit("a")
    assert not sent(desk.step(), msg.Reserve)
    desk.now = PREFILL_GRACE_S
    desk.hear("d1", msg.Heartbeat("d1/0", 2))
    assert sent(desk.step(), msg.Reserve)


@pytest.mark.parametrize("decodes", [1, 2])
def test_a_cluster_without_prefill_workers_answers_rightly(decodes: int) -> None:
    town = Town(prefills=1, decodes=decodes)
    town.submit("before", range(1, 12), 4)
    town.run_all(["before"])
    (prefill,) = town.workers("prefill")
    town.kill(prefill, restart=False)
    names = [f"r{index}" for index in range(6)]
    for index, name in enumerate(names):
        town.submit(name, range(index * 20 + 1, index * 20 + 14), 5)
    town.run_all(names)
    town.start_worker("prefill", 0)
    town.run(lambda: town.router.info(town.now).degraded == "")
    seen: list[type] = []
    town.before = lambda s, r, message: seen.append(type(message))
    town.submit("after", range(200, 212), 4)
    town.run_all(["after"])
    assert msg.Fill in seen
    for index, name in enumerate(names):
        assert (
            town.outcomes[name].tokens == calm_answer(range(index * 20 + 1, index * 20 + 14), 5)[0]
        )


def test_a_stalled_prefill_worker_holds_up_nothing_that_it_has_not_begun() -> None:
    town = Town(patience_s=300.0)
    town.submit("before", range(1, 12), 4)
    town.run_all(["before"])
    town.stalled.update(town.workers("prefill"))
    began = town.now
    town.run(lambda: town.now > began + 4.0)
    town.submit("a", range(20, 32), 4)
    town.run(lambda: bool(town.outcomes["a"].ends))
    assert town.now < began + 10.0
    assert town.router.info(town.now).ready


def test_what_is_missing_fits_its_message_however_large_the_cluster_and_long_the_reasons() -> None:
    """A text past its bounds would be refused by every client: they would see no cluster at all."""
    names = [f"{role}{'x' * 200}{number}" for role in "dp" for number in range(40)]
    desk = Desk("d1", *names)
    long = "y" * 2**16
    for prefill in [name for name in names if name.startswith("p")]:
        for owner in ["d1", *(name for name in names if name.startswith("d"))]:
            desk.hear(prefill, msg.AttachFailed(owner, f"{owner}/0", long))
    down = [
        ProcessDown(f"{role}-{number}", role, 6, long, 1.0, long)
        for role in ("prefill", "decode") for number in range(40)
    ]  # fmt: skip
    texts = []
    for each in (msg.Supervised(()), msg.Supervised(tuple(down))):
        desk.hear("boss", each)
        texts.append(info(desk).degraded)
        assert decode(encode(info(desk))) == info(desk)
    assert all("cannot write to" in text for text in texts)
    assert "and 1632 more" in texts[0]
    desk.now += SILENT
    assert "is silent for 3 s" in info(desk).degraded
    assert decode(encode(info(desk))) == info(desk)
    for name in ("d1", *names):
        desk.hear(name, msg.Exited(name))
    assert "and 32 more" in info(desk).waiting_for
    assert decode(encode(info(desk))) == info(desk)
