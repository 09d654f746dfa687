"""Workers that leave and join under load: SIGTERM, Leaving, Dismissed.

Every request ends once with the tokens of a calm run, nothing leaks, no loss is counted, and no request
waits for a worker that left.
"""

import random
from collections.abc import Callable

import pytest

from baton.wire import messages as msg
from baton.wire.membership import Membership
from baton.wire.node import ROUTER, Stop, To
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from tests.pure.desk import Desk, sent
from tests.pure.test_cluster_nodes import CALM_MESSAGES, PROMPTS, assert_calm, town_with_requests
from tests.pure.test_cluster_random import assert_ended, guard, prompts_of, town_of
from tests.pure.test_membership import HELLO, WELCOME
from tests.pure.town import Town, calm_answer

ROLES = ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def losses(town: Town) -> tuple[int, int]:
    counts = town.router._observers.counts(town.router.ledger, town.router.workers, 0.0)
    return counts.lost_prefill, counts.lost_decode


def left(town: Town, victim: str, at: int, within_s: float, *, replaced: bool) -> Town:
    """A run in which SIGTERM reaches this worker before message `at`. One that has joined is no loss."""
    victims: list[str] = []
    joined: list[bool] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        guard(town)
        if town.delivered == at:
            victims.extend(town.workers(victim))
            for name in victims:
                joined.append(town.nodes[name]._membership.joined)  # type: ignore[attr-defined]
                town.terminate(name, within_s)
                if replaced:
                    role, index = name.split(".")[0].split("-")
                    town.start_worker(role, int(index))

    town.before = before
    town.run_all(PROMPTS)
    town.run(lambda: not set(victims) & set(town.workers()))
    town.run(lambda: len(town.router.workers.infos(town.now)) == len(town.workers()))
    town.settle()
    assert not all(joined) or losses(town) == (0, 0)
    return town


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1))
@pytest.mark.parametrize("victim", ROLES)
def test_a_worker_may_leave_before_any_message(victim: str, at: int) -> None:
    town = left(town_with_requests(), victim, at, 30.0, replaced=False)
    assert_calm(town)


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 2))
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_all_workers_of_a_role_may_be_replaced_at_any_message(victim: str, at: int) -> None:
    town = left(town_with_requests(), victim, at, 30.0, replaced=True)
    assert_calm(town)


@pytest.mark.parametrize("at", range(1, CALM_MESSAGES + 1, 2))
@pytest.mark.parametrize("victim", ROLES)
def test_a_worker_that_ends_before_its_work_costs_no_request_a_try(victim: str, at: int) -> None:
    town = left(town_with_requests(), victim, at, 0.001, replaced=True)
    assert_calm(town)


@pytest.mark.parametrize("seed", range(40))
def test_workers_come_and_go_under_load(seed: int) -> None:
    dice = random.Random(7000 + seed)
    town, prompts = town_of(dice), prompts_of(dice)
    left_over = [dice.randint(1, 8)]

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        guard(town)
        if not left_over[0] or dice.random() > 0.05:
            return
        left_over[0] -= 1
        match dice.choice(["leave", "leave", "kill", "join"]):
            case "leave":
                name = dice.choice(town.workers())
                town.terminate(name, dice.choice([0.0, 0.002, 0.02, 30.0]))
                role, index = name.split(".")[0].split("-")
                town.start_worker(role, int(index))
            case "kill":
                town.kill(dice.choice(town.workers()))
            case "join":
                town.start_worker(dice.choice(["prefill", "decode"]), 7)

    town.before = before
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)
    town.run(lambda: all(town.outcomes[name].ends for name in prompts), turns=6000)
    town.before = None
    town.settle()
    assert_ended(town, prompts)
    for node in town.nodes.values():
        if isinstance(node, PrefillWorker):
            assert not node._jobs
        if isinstance(node, DecodeWorker):
            assert (node.runs, node.arriving) == ({}, {})


def test_what_decodes_on_a_leaving_worker_stays_there_and_new_requests_go_elsewhere() -> None:
    town = Town(prefills=1, decodes=2)
    town.submit("old", range(1, 9), 40)
    town.run(lambda: len(town.outcomes["old"].tokens) > 3)
    entry = town.router.ledger.get("old")
    assert entry is not None
    leaving = entry.decode
    assert leaving is not None
    town.terminate(leaving)
    town.turn()
    orders: list[tuple[type, str]] = []
    town.before = lambda s, receiver, message: orders.append((type(message), receiver))
    for index in range(3):
        town.submit(f"new{index}", range(20 + index, 30 + index), 4)
    town.run_all(["old", *(f"new{index}" for index in range(3))])
    assert (msg.Reserve, leaving) not in orders
    assert (msg.Cancel, leaving) not in orders
    assert orders.count((msg.Dismissed, leaving)) == 1
    assert town.outcomes["old"].tokens == calm_answer(range(1, 9), 40)[0]
    assert leaving not in town.nodes


def test_what_is_not_finished_in_time_goes_on_elsewhere_from_where_it_stopped() -> None:
    town = Town(prefills=1, decodes=2)
    town.submit("long", range(1, 9), 60)
    town.run(lambda: len(town.outcomes["long"].tokens) > 3)
    entry = town.router.ledger.get("long")
    assert entry is not None
    assert entry.decode is not None
    town.terminate(entry.decode, 0.01)
    town.run_all(["long"])
    assert town.outcomes["long"].tokens == calm_answer(range(1, 9), 60)[0]
    assert losses(town) == (0, 0)


# ---- the router


def test_a_leaving_worker_gets_nothing_new_and_is_dismissed_once_when_nothing_runs_there() -> None:
    desk = Desk("d1", "d2", "p1")
    desk.submit("a")
    desk.step()
    entry = desk.router.ledger.get("a")
    assert entry is not None
    assert entry.decode == "d1"
    desk.hear("d1", msg.Leaving(30.0))
    assert not sent(desk.step(), msg.Dismissed)
    desk.submit("b")
    assert [peer for peer, _ in sent(desk.step(), msg.Reserve)] == ["d2"]
    desk.hear("client", msg.Abort("a"))
    effects = desk.step()
    assert sent(effects, msg.Dismissed) == [("d1", msg.Dismissed())]
    assert sent(effects, msg.Detach) == [("p1", msg.Detach("d1", "d1/0"))]
    assert not sent(desk.step(), msg.Dismissed)


def test_the_announced_end_of_a_worker_is_no_loss_and_an_early_one_costs_no_try() -> None:
    desk = Desk()
    desk.to_decoding()
    desk.hear("d1", msg.Leaving(1.0))
    desk.hear("d1", msg.Exited("d1"))
    entry = desk.router.ledger.get("a")
    assert entry is not None
    assert entry.tries.deaths == 0
    assert (
        desk.router._observers.counts(desk.router.ledger, desk.router.workers, 0.0).lost_decode == 0
    )


def test_blocks_a_leaving_writer_may_write_to_are_free_only_when_it_has_ended() -> None:
    desk = Desk()
    desk.hear("p1", msg.Leaving(30.0))
    assert sent(desk.step(), msg.Dismissed)
    assert desk.hear("p1", msg.Unreachable("p1")) == []
    assert desk.hear("p1", msg.Exited("p1")) == [To("d1", msg.WriterClear("p1"))]


def test_a_worker_that_says_hello_again_leaves_no_more() -> None:
    desk = Desk()
    desk.hear("d1", msg.Leaving(30.0))
    desk.join("d1", epoch="d1/1")
    desk.hear("p1", msg.Attached("d1", "d1/1", "shm", 0.0, ""))
    desk.submit("a")
    assert sent(desk.step(), msg.Reserve)


# ---- the worker


class Leaver:
    """A membership that was told to end."""

    def __init__(self, *, within_s: float = 10.0, joined: bool = True) -> None:
        self.membership = Membership(HELLO, lambda epoch: ())
        self.membership.step(0.0)
        if joined:
            self.membership.handle(WELCOME, 0.0)
        self.effects = self.membership.handle(msg.Terminate(within_s), 1.0)


def test_a_joined_worker_announces_its_end_and_works_on() -> None:
    leaver = Leaver()
    assert leaver.effects == [To(ROUTER, msg.Leaving(10.0))]
    beats = leaver.membership.step(1.5)
    assert [type(e.message) for e in beats if isinstance(e, To)] == [msg.Heartbeat]
    assert leaver.membership.handle(msg.Reserve("a#0", 3), 1.6) is None


@pytest.mark.parametrize(
    "end",
    [
        lambda m: m.handle(msg.Dismissed(), 2.0),
        lambda m: m.handle(msg.Reset("given up"), 2.0),
        lambda m: m.handle(msg.Exited(ROUTER), 2.0),
        lambda m: m.handle(msg.Unreachable(ROUTER), 2.0),
        lambda m: m.handle(msg.Heartbeat("router/2", 1), 2.0),
        lambda m: m.step(11.0),
    ],
    ids=["dismissed", "reset", "exited", "unreachable", "another router", "deadline"],
)  # fmt: skip
def test_a_leaving_worker_ends_when_nothing_is_left_to_wait_for(
    end: Callable[[Membership], object],
) -> None:
    assert end(Leaver().membership) == [Stop(0, "")]


@pytest.mark.parametrize("leaver", [Leaver(joined=False), Leaver(within_s=0.0)])
def test_without_a_router_or_time_it_ends_at_once(leaver: Leaver) -> None:
    assert leaver.effects == [Stop(0, "")]


def test_a_dismissal_nobody_asked_for_is_ignored() -> None:
    membership = Membership(HELLO, lambda epoch: ())
    membership.step(0.0)
    membership.handle(WELCOME, 0.0)
    assert membership.handle(msg.Dismissed(), 1.0) == []


def test_a_leaving_worker_wakes_at_its_deadline() -> None:
    leaver = Leaver(within_s=0.2)
    leaver.membership.step(1.0)
    assert leaver.membership.due(1.1) == pytest.approx(0.1)
