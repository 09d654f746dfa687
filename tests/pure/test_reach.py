"""What can be filled now, and when time alone makes an order possible: on a virtual clock."""

import pytest

from baton.lifecycle import State
from baton.wire import messages as msg
from router.batching import Rules
from router.readiness import PREFILL_GRACE_S
from router.scheduling import DEFERRED_S
from router.tries import ISOLATION_S, QUARANTINE_AFTER
from router.ways import FIRST_S, STEADY_S, Ways
from router.workers import SILENT_S
from tests.pure.desk import Desk, sent
from tests.pure.slow_loads import wrong_counts


def desk_with_a_pending_way() -> Desk:
    """p1 writes to d1 and d2, p2 to d2 only: it has not answered yet whether it can write to d1. Two
    requests each have blocks on d1, which were granted first, and on d2. A batch has room for two."""
    desk = Desk("d1", "d2", "p1", rules=Rules(batch_size=8, window_s=0.0, token_budget=4))
    desk.join("p2")
    desk.hear("p2", msg.Attached("d2", "d2/0", "shm", 0.0, ""))
    for name in "abcd":
        desk.submit(name)
    placed = {order.run: peer for peer, order in sent(desk.step(), msg.Reserve)}  # type: ignore[attr-defined]
    assert sorted(placed.values()) == ["d1", "d1", "d2", "d2"]
    for run, worker in sorted(placed.items(), key=lambda item: item[1]):
        desk.hear(worker, msg.Reserved(desk.grant(run, worker)))
    return desk


def lose(desk: Desk, prefill: str, decode: str) -> None:
    desk.hear(prefill, msg.WayLost(decode, f"{decode}/0", "it took nothing", ()))


def filled(desk: Desk) -> list[str]:
    """Decode workers for which something is filled at this step."""
    return [order.grant.worker for _, order in sent(desk.step(), msg.Fill)]  # type: ignore[attr-defined]


def test_what_waits_for_an_attach_takes_no_place_in_a_batch() -> None:
    desk = desk_with_a_pending_way()
    lose(desk, "p1", "d1")
    assert filled(desk) == ["d2", "d2"]
    assert filled(desk) == []
    assert desk.router.ledger.count(State.RESERVED) == 2, "they keep their blocks and wait"
    desk.hear("p2", msg.Attached("d1", "d1/0", "shm", 0.0, ""))
    assert len(sent(desk.step(), msg.Cancel)) == 2, "they get blocks that p2 may write to"
    assert not [*wrong_counts(desk.router)]


def test_all_is_filled_in_order_where_every_way_is_open() -> None:
    desk = desk_with_a_pending_way()
    assert filled(desk) == ["d1", "d1"]
    assert filled(desk) == ["d2", "d2"]


def test_ways_are_forgotten_when_they_were_steady_and_when_a_worker_has_left() -> None:
    ways = Ways()
    for decode in "xyz":
        ways.failed("p", decode, 0.0)
    assert len(ways.to_try(FIRST_S)) == 3
    assert ways.any_down
    ways.opened("p", "x", 1.0)
    ways.opened("p", "y", 1.0)
    assert ways.any_down
    ways.forget("z")
    assert (len(ways), ways.any_down) == (2, False)
    ways.opened("p", "unknown", 1.0)
    ways.failed("p", "y", 1.0 + STEADY_S)
    assert ways.any_down
    ways.to_try(1.0 + STEADY_S + FIRST_S)
    assert len(ways) == 1


# ---- when


def first(desk: Desk, kind: type, *, alive: str) -> float:
    """The time of the first such order, if the router is woken up when it asks for it. These workers send
    heartbeats."""
    for number in range(400):
        if sent(desk.step(), kind):
            return desk.now
        desk.now += desk.router.due(desk.now)
        for worker in alive.split():
            desk.hear(worker, msg.Heartbeat(f"{worker}/0", number))
    raise AssertionError(f"no {kind.__name__} until {desk.now}")


def test_a_full_pool_is_asked_again_in_time_for_those_it_has_not_deferred() -> None:
    desk = Desk()
    desk.now = 0.25
    desk.submit("a")
    desk.submit("b")
    desk.step()
    desk.hear("d1", msg.Deferred(desk.run("a")))
    desk.hear("client", msg.Abort("a"))
    desk.submit("c")
    assert first(desk, msg.Reserve, alive="d1 p1") == pytest.approx(0.25 + DEFERRED_S)


@pytest.mark.parametrize("quarantined", ["first", "second"])
def test_others_are_placed_as_soon_as_an_isolation_ends(quarantined: str) -> None:
    """Beside one that killed workers, and one that killed them behind others."""
    desk = Desk()
    desk.now = 0.25
    desk.step()
    desk.submit("first")
    if quarantined == "first":
        desk.router.ledger.entry("first").tries.deaths = QUARANTINE_AFTER
    desk.now = 0.375
    assert len(sent(desk.step(), msg.Reserve)) == 1
    desk.now = 0.5
    desk.submit("second")
    if quarantined == "second":
        desk.router.ledger.entry("second").tries.deaths = QUARANTINE_AFTER
    assert first(desk, msg.Reserve, alive="d1 p1") == pytest.approx(0.375 + ISOLATION_S)


def test_prompts_are_filled_by_decode_as_soon_as_no_prefill_worker_is_waited_for() -> None:
    desk = Desk("d1")
    desk.now = 0.25
    desk.step()
    desk.submit("a")
    assert first(desk, msg.Reserve, alive="d1") == pytest.approx(PREFILL_GRACE_S)


def test_and_as_soon_as_the_last_one_is_silent_for_too_long() -> None:
    desk = Desk("d1", "d2", "p1")
    desk.step()
    desk.join("d3")  # p1 is asked to attach
    desk.hear("d1", msg.Exited("d1"))
    desk.hear("d2", msg.Exited("d2"))
    desk.now = 0.25
    desk.step()
    desk.hear("p1", msg.Heartbeat("p1/0", 1))
    desk.submit("a")
    assert first(desk, msg.Reserve, alive="d3") == pytest.approx(0.25 + SILENT_S)


def test_a_fill_moves_as_soon_as_its_worker_counts_as_dead_however_often_it_was_suspect() -> None:
    desk = Desk()
    desk.now = 0.25
    desk.to_filling()
    desk.now = SILENT_S + 1  # suspect, and back
    desk.hear("d1", msg.Heartbeat("d1/0", 1))
    desk.step()
    desk.now += 0.125
    desk.hear("p1", msg.Heartbeat("p1/0", 1))
    heard, patience = desk.now, 10.0
    assert first(desk, msg.Cancel, alive="d1") == pytest.approx(heard + SILENT_S + patience)
