"""The router where things are odd: twice, too late, from strangers, about somebody else's run."""

import dataclasses

import pytest

from baton.kv.grant import Grant
from baton.lifecycle import State
from baton.wire import messages as msg
from baton.wire.membership import Membership
from baton.wire.node import Stop, To
from baton.wire.records import Timings
from prefill_worker.worker import PrefillWorker
from tests.pure.desk import RECEIPT, RULES, Desk, sent
from tests.pure.test_workers import hello
from tests.pure.town import PretendPrefill, Town

A_FILL = msg.Fill(Grant("d1", "d1/0", "a#0", 1, (0,)), (1, 2))

REPORTS = [
    msg.Heartbeat("x/0", 1), msg.Reserved(Grant("x", "x/0", "a#0", 1, (0,))), msg.Deferred("a#0"),
    msg.Expired("a#0"), msg.Filled("a#0", RECEIPT, 0.0), msg.FillFailed("a#0", "why"),
    msg.Released("a#0"), msg.FillRefused("a#0", "why"), msg.RunFailed("a#0", "c", "m"),
    msg.Decoded((msg.RunTokens("a#0", 3, (5,)),)), msg.Attached("d1", "d1/0", "shm", 0.0, ""),
    msg.AttachFailed("d1", "d1/0", "why"),
]  # fmt: skip


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_stranger_is_told_to_say_hello_and_changes_nothing(report: msg.Message) -> None:
    desk = Desk()
    desk.to_decoding()
    (effect,) = desk.hear("stranger", report)
    assert isinstance(effect, To)
    assert effect.peer == "stranger"
    assert isinstance(effect.message, msg.Reset)
    assert desk.state("a") is State.DECODING


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
@pytest.mark.parametrize("sender", ["d1", "p1"])
def test_a_report_on_no_run_of_ours_changes_nothing(sender: str, report: msg.Message) -> None:
    desk = Desk()
    effects = desk.hear(sender, report)
    assert len(desk.router.ledger) == 0
    assert not sent(effects, msg.Reset)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_on_a_finished_run_changes_nothing(report: msg.Message) -> None:
    desk = Desk()
    desk.to_decoding()
    desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 3, (5,), "length"),)))
    assert desk.state("a") is None
    effects = desk.hear("d1", report)
    assert not [e for e in effects if isinstance(e, To) and e.peer == "client"]


@pytest.mark.parametrize(
    "order",
    [msg.Reserve("a#0", 3), msg.Drop("a#0"), A_FILL, msg.Renew(()), msg.Welcome("e", "h", 1),
     msg.Accepted("a", 1, 0.0), msg.Finished("a", "stop", Timings())],
    ids=lambda order: type(order).__name__,
)  # fmt: skip
def test_orders_and_answers_are_nothing_the_router_obeys(order: msg.Message) -> None:
    desk = Desk()
    desk.to_decoding()
    assert desk.hear("d1", order) == []
    assert desk.state("a") is State.DECODING


def test_a_request_id_in_use_is_refused_and_the_first_goes_on() -> None:
    desk = Desk()
    desk.to_decoding()
    (effect,) = desk.submit("a")
    assert isinstance(effect, To)
    assert isinstance(effect.message, msg.Failed)
    assert effect.message.code == "invalid_request"
    assert desk.state("a") is State.DECODING


def test_a_malformed_submit_is_answered_with_the_rule_it_breaks() -> None:
    desk = Desk()
    answer = desk.hear("client", msg.Malformed("Submit", "a", "max_new_tokens must be at least 1"))
    rule = "max_new_tokens must be at least 1"
    assert answer == [To("client", msg.Failed("a", "invalid_request", rule))]
    assert desk.state("a") is None


@pytest.mark.parametrize("kind", ["LoadAdapter", "UnloadAdapter"])
def test_a_malformed_change_of_adapters_is_answered_too(kind: str) -> None:
    answer = Desk().hear("client", msg.Malformed(kind, "a", "name must be printable"))
    changed = msg.AdapterChanged("a", "invalid_request", "name must be printable")
    assert answer == [To("client", changed)]


@pytest.mark.parametrize("readable", [True, False])
def test_a_worker_of_another_protocol_is_refused_with_both_numbers(readable: bool) -> None:
    desk = Desk()
    old: msg.Message = msg.Malformed("Hello", "5", "Hello has 18 fields, got 5")
    if readable:
        old = dataclasses.replace(hello("d2"), protocol=5)
    why = f"the worker speaks protocol 5, the router {msg.PROTOCOL}"
    assert desk.hear("d2", old) == [To("d2", msg.Refused(why))]
    worker = Membership(hello("d2"), lambda epoch: ())
    [stop] = worker.handle(msg.Refused(why), 0.0) or []
    assert stop == Stop(4, f"the router refused this worker: {why}")


def test_a_malformed_hello_of_our_own_protocol_is_refused_with_the_reason() -> None:
    broken = msg.Malformed("Hello", str(msg.PROTOCOL), "Hello.pid must be int, got str")
    [effect] = Desk().hear("d2", broken)
    assert effect == To("d2", msg.Refused(f"the worker's Hello is malformed: {broken.why}"))


def test_an_id_can_be_used_again_once_its_request_has_ended() -> None:
    desk = Desk()
    desk.to_decoding()
    desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 3, (5,), "length"),)))
    assert sent(desk.submit("a"), msg.Accepted)


def test_aborting_what_is_unknown_does_nothing() -> None:
    assert Desk().hear("client", msg.Abort("nobody")) == []


def test_aborting_twice_ends_once() -> None:
    desk = Desk()
    desk.to_decoding()
    assert len(sent(desk.hear("client", msg.Abort("a")), msg.Finished)) == 1
    assert desk.hear("client", msg.Abort("a")) == []


def test_blocks_granted_to_a_run_that_is_over_are_given_back() -> None:
    desk = Desk()
    desk.submit("a")
    desk.step()
    desk.hear("client", msg.Abort("a"))
    effects = desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    assert sent(effects, msg.Cancel) == [("d1", msg.Cancel("a#0"))]


def test_filled_twice_starts_once() -> None:
    desk = Desk()
    desk.to_filling()
    assert len(sent(desk.hear("p1", msg.Filled("a#0", RECEIPT, 0.0)), msg.Start)) == 1
    assert desk.hear("p1", msg.Filled("a#0", RECEIPT, 0.0)) == []


def test_tokens_after_the_last_are_not_passed_on() -> None:
    desk = Desk()
    desk.to_decoding()
    tokens = (msg.RunTokens("a#0", 3, (5,), "length"), msg.RunTokens("a#0", 4, (6,)))
    effects = desk.hear("d1", msg.Decoded(tokens))
    assert [message.token_ids for _, message in sent(effects, msg.Emitted)] == [(5,)]


def test_a_cancelled_fill_is_dropped_and_its_blocks_wait_for_the_writers_word() -> None:
    desk = Desk()
    desk.to_filling()
    effects = desk.hear("client", msg.Abort("a"))
    assert sent(effects, msg.Drop) == [("p1", msg.Drop("a#0"))]
    assert sent(effects, msg.Cancel) == [("d1", msg.Cancel("a#0", "p1"))]
    assert desk.hear("p1", msg.Released("a#0")) == [To("d1", msg.Released("a#0", "p1"))]
    assert desk.hear("p1", msg.Released("a#0")) == []


@pytest.mark.parametrize("last", [msg.Filled("a#0", RECEIPT, 0.0), msg.FillFailed("a#0", "why")])
def test_any_last_word_on_a_cancelled_fill_frees_its_blocks(last: msg.Message) -> None:
    desk = Desk()
    desk.to_filling()
    desk.hear("client", msg.Abort("a"))
    assert desk.hear("p1", last) == [To("d1", msg.Released("a#0", "p1"))]


def test_late_reports_on_a_request_say_nothing_of_the_next_one_with_its_id() -> None:
    """A client may end a request and submit another one under the same id at once."""
    desk = Desk()
    desk.to_filling()
    old = desk.run("a")
    dropped = desk.hear("client", msg.Abort("a"))
    assert sent(dropped, msg.Drop) == [("p1", msg.Drop(old))]
    desk.to_filling()
    assert desk.run("a") != old
    assert desk.hear("p1", msg.Filled(old, RECEIPT, 0.0)) == [To("d1", msg.Released(old, "p1"))]
    assert desk.state("a") is State.FILLING
    desk.hear("p1", msg.Filled(desk.run("a"), RECEIPT, 0.0))
    assert not sent(desk.hear("d1", msg.Decoded((msg.RunTokens(old, 3, (5,)),))), msg.Emitted)
    assert not sent(desk.hear("d1", msg.RunFailed(old, "numerical_error", "")), msg.Failed)
    assert desk.state("a") is State.DECODING


def test_hello_with_a_new_epoch_starts_the_requests_on_it_over() -> None:
    desk = Desk()
    desk.to_decoding()
    effects = desk.join("d1", epoch="d1/1")
    assert sent(effects, msg.Welcome)
    assert sent(effects, msg.Detach)
    assert desk.state("a") is State.QUEUED
    assert len(list(desk.router.workers)) == 2


def test_a_worker_that_does_not_fit_is_refused_and_nobody_else_is_told() -> None:
    effects = Desk().join("d2", model="other model")
    assert [type(e.message) for e in effects if isinstance(e, To)] == [msg.Refused]


def test_a_storm_of_requests_is_accepted_queued_and_kept_within_the_batch() -> None:
    desk = Desk()
    for index in range(2000):
        assert sent(desk.submit(f"r{index}"), msg.Accepted)
    assert len(sent(desk.step(), msg.Reserve)) == RULES.batch_size
    assert sent(desk.step(), msg.Reserve) == []
    for index in range(2000):
        desk.hear("client", msg.Abort(f"r{index}"))
    assert len(desk.router.ledger) == 0


def test_a_client_that_leaves_while_its_request_is_filled_leaves_no_writer_behind() -> None:
    desk = Desk()
    desk.to_filling()
    effects = desk.hear("client", msg.Exited("client"))
    assert sent(effects, msg.Drop)
    assert sent(effects, msg.Cancel)
    assert len(desk.router.ledger) == 0


def test_who_inquires_is_told_at_the_next_step_and_again_only_when_it_changes() -> None:
    desk = Desk()
    desk.hear("client", msg.GetClusterInfo())
    assert len(sent(desk.step(), msg.ClusterInfo)) == 1
    assert sent(desk.step(), msg.ClusterInfo) == []
    desk.hear("d1", msg.Exited("d1"))
    ((_, info),) = sent(desk.step(), msg.ClusterInfo)
    assert isinstance(info, msg.ClusterInfo)
    assert not info.ready


def test_due_is_never_negative_and_never_past_the_next_beat() -> None:
    desk = Desk()
    desk.step()
    for at in (0.0, 0.5, 1.0, 7.0):
        assert 0.0 <= desk.router.due(at) <= 1.0


def test_the_leases_of_what_waits_and_of_what_is_filled_are_renewed_with_every_beat() -> None:
    desk = Desk(rules=dataclasses.replace(RULES, window_s=100.0))
    desk.submit("waiting")
    desk.submit("decoding", prompt=(1,))
    desk.step()
    for run in ("waiting#0", "decoding#0"):
        desk.hear("d1", msg.Reserved(desk.grant(run)))
    desk.step()
    desk.now = 1.0
    assert sent(desk.step(), msg.Renew) == [("d1", msg.Renew(("waiting#0",)))]
    assert sent(desk.step(), msg.Renew) == []


def prefill_with_a_fill_in_hand(town: Town) -> PrefillWorker:
    (decode,) = town.workers("decode")
    worker = PrefillWorker(hello("p1"), PretendPrefill(town), token_budget=16)
    worker.handle("router", msg.Welcome("router/1", "here", 1), 0.0)
    worker.handle("router", msg.Attach(decode, "e", ()), 0.0)
    worker.handle("router", a_fill(town), 0.0)
    return worker


def a_fill(town: Town) -> msg.Fill:
    (decode,) = town.workers("decode")
    return msg.Fill(Grant(decode, "e", "a#0", 1, (0,)), (1, 2))


def written(town: Town) -> bool:
    (memory,) = town.memories.values()
    return bool(memory.cells)


def test_a_prefill_worker_fills_what_it_is_told_to() -> None:
    town = Town()
    prefill_with_a_fill_in_hand(town).step(0.1)
    assert written(town)


@pytest.mark.parametrize(
    "end", [msg.Reset("given up"), msg.Exited("router"), msg.Heartbeat("router/2", 1), msg.Drop("a#0")],
    ids=lambda end: type(end).__name__,
)  # fmt: skip
def test_a_prefill_worker_writes_no_more_once_its_fill_is_over(end: msg.Message) -> None:
    town = Town()
    worker = prefill_with_a_fill_in_hand(town)
    worker.handle("router", end, 0.1)
    worker.step(0.1)
    assert not written(town)


def test_a_prefill_worker_drops_what_was_for_a_pool_that_is_gone() -> None:
    town = Town()
    worker = prefill_with_a_fill_in_hand(town)
    worker.handle("router", msg.Detach(town.workers("decode")[0], "e"), 0.1)
    assert not [
        e for e in worker.step(0.1) if isinstance(e, To) and isinstance(e.message, msg.Filled)
    ]
    assert not written(town)


# ---- found by review; each is a bug until its mark is taken away


def test_hello_twice_with_the_same_epoch_is_one_worker_that_knocked_twice() -> None:
    desk = Desk()
    desk.submit("a")
    desk.step()
    effects = desk.join("d1")
    assert sent(effects, msg.Welcome)
    entry = desk.router.ledger.get("a")
    assert entry is not None
    assert (entry.state, entry.tries.deaths) == (State.RESERVING, 0)


def test_hello_in_anothers_name_is_refused() -> None:
    desk = Desk()
    desk.to_decoding()
    desk.hear("p1", dataclasses.replace(hello("d1"), blocks=64, epoch="d1/1"))
    assert desk.state("a") is State.DECODING


def test_blocks_offered_by_a_worker_that_was_not_asked_are_not_taken() -> None:
    desk = Desk("d1", "d2", "p1")
    desk.submit("a")
    desk.step()
    desk.hear("d2", msg.Reserved(desk.grant("a#0", worker="d2")))
    assert desk.state("a") is State.RESERVING


def test_a_request_is_taken_back_by_its_own_client_only() -> None:
    desk = Desk()
    desk.to_decoding()
    desk.hear("another client", msg.Abort("a"))
    assert desk.state("a") is State.DECODING


def test_a_hello_with_impossible_numbers_does_not_stop_the_router() -> None:
    desk = Desk()
    desk.hear("d1", msg.Exited("d1"))
    desk.join("d2", block_size=0)
    desk.submit("a")
    desk.step()


def test_nothing_is_remembered_of_fills_whose_writer_died() -> None:
    desk = Desk()
    desk.to_filling()
    desk.hear("client", msg.Abort("a"))
    desk.hear("p1", msg.Exited("p1"))
    assert not desk.router._requests._dropping


def test_nothing_is_remembered_of_ways_to_pools_that_are_gone() -> None:
    desk = Desk("p1")
    desk.hear("p1", msg.AttachFailed("d9", "d9/0", "it is gone"))
    prefill = desk.router.workers.get("p1")
    assert prefill is not None
    assert not prefill.failed


def test_the_requests_of_a_dead_worker_go_back_in_the_order_they_came() -> None:
    desk = Desk()
    desk.to_decoding("first")
    desk.submit("second")
    desk.step()
    desk.hear("d1", msg.Exited("d1"))
    assert sorted(e.id for e in desk.router.ledger.queued_again()) == ["first", "second"]
    first = desk.router.ledger.next_queued(desk.now)
    assert first is desk.router.ledger.get("first")


def test_a_decode_worker_nobody_can_fill_gets_nothing_to_be_filled() -> None:
    desk = Desk("p1", "d1")
    desk.join("d2")
    desk.hear("p1", msg.AttachFailed("d2", "d2/0", "no way"))
    for index in range(4):
        desk.submit(f"r{index}")
    assert {peer for peer, _ in sent(desk.step(), msg.Reserve)} == {"d1"}


def test_a_lost_connection_is_no_proof_that_a_writer_has_stopped() -> None:
    """The loop says the same of both. It needs a word of its own for a peer that cannot be reached."""
    from baton.wire.loop import Loop
    from tests.pure.looping import PretendChannel, Recorder, close_pretend_channels

    node = Recorder(steps=[[To("p1", msg.Drop("a#0"))], [Stop(0, "")]])
    channel = PretendChannel(unreachable={"p1"})
    try:
        assert Loop(node, channel).run() == 0
    finally:
        close_pretend_channels()
    assert [m for _, m in node.handled] != [msg.Exited("p1")]


def test_a_prefill_worker_that_started_anew_fills_nothing_for_its_old_life() -> None:
    town = Town()
    worker = prefill_with_a_fill_in_hand(town)
    worker.handle("router", msg.Drop("a#0"), 1.0)
    worker.step(6.0)  # the router was silent too long: it says Hello under a new epoch
    worker.handle("router", a_fill(town), 6.0)
    worker.step(6.1)
    assert not written(town)


def test_a_gap_in_the_tokens_is_noticed_and_the_request_goes_on_from_what_was_sent() -> None:
    desk = Desk()
    desk.to_decoding()
    desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 3, (5,)),)))
    effects = desk.hear("d1", msg.Decoded((msg.RunTokens("a#0", 5, (6,)),)))
    assert not sent(effects, msg.Emitted)
    assert desk.state("a") is State.QUEUED
    entry = desk.router.ledger.get("a")
    assert entry is not None
    assert entry.token_ids == (1, 2, 3, 5)


def test_a_request_whose_decode_worker_is_out_of_everybodys_reach_is_placed_anew() -> None:
    desk = Desk("d1", "p1")
    desk.submit("a")
    desk.step()
    desk.join("d2")
    desk.hear("p1", msg.Attached("d2", "d2/0", "shm", 0.0, ""))
    desk.join("p2")
    desk.hear("p2", msg.Attached("d2", "d2/0", "shm", 0.0, ""))
    desk.hear("p1", msg.Exited("p1"))
    desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    desk.hear("p2", msg.AttachFailed("d1", "d1/0", "no way"))
    desk.now += 1
    for worker in ("d1", "d2", "p2"):
        desk.hear(worker, msg.Heartbeat(f"{worker}/0", 2))
    assert sent(desk.step(), msg.Cancel) == [("d1", msg.Cancel("a#0"))]
    assert desk.state("a") is State.QUEUED


def test_a_prefill_worker_fills_no_blocks_that_were_granted_before_it_could_write() -> None:
    desk = Desk()
    desk.submit("a")
    assert [to for to, _ in sent(desk.step(), msg.Reserve)] == ["d1"]
    desk.join("p1", epoch="p1/1")  # d1 learns of it only after it has read the Reserve
    desk.hear("p1", msg.Attached("d1", "d1/0", "shm", 0.0, ""))
    desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    effects = desk.step()
    assert not sent(effects, msg.Fill)
    assert sent(effects, msg.Cancel) == [("d1", msg.Cancel("a#0"))]
    assert [order.run for _, order in sent(desk.step(), msg.Reserve)] == ["a#1"]  # type: ignore[attr-defined]
    desk.hear("d1", msg.Reserved(desk.grant("a#1")))
    assert [to for to, _ in sent(desk.step(), msg.Fill)] == ["p1"]
