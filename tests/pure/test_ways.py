"""Ways between prefill and decode workers that fail: who is asked to try again, what goes elsewhere."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest

from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.lifecycle import State
from baton.wire import messages as msg
from baton.wire.membership import BEAT_S
from prefill_worker.model import Chunk, News, Sent
from router.readiness import FILLING_THEMSELVES
from router.router import Router
from router.tries import LOCAL_AFTER_DETOURS
from router.ways import FIRST_S, MOST_S, STEADY_S, Ways
from router.workers import PREFILL, WorkerRegistry
from tests.pure.desk import RECEIPT, Desk, sent
from tests.pure.test_workers import hello, told
from tests.pure.town import PretendDecode, PretendPrefill, Town, calm_answer

# ---- the table, in every order of events

ACTIONS = ("attached", "attach fails", "push fails", "decode restarts", "prefill restarts", "time")


class Table:
    """One prefill worker and one decode worker, and what the first was asked and has not answered."""

    def __init__(self) -> None:
        self.members = WorkerRegistry(model="m" * 16, host="here")
        self.now, self.lives = 0.0, 0
        self.epoch = "d1/0"
        self.asked: list[str] = []  # epochs of d1
        self.hear(self.members.join(hello("p1"), 0.0))
        self.hear(self.members.join(hello("d1"), 0.0))

    def hear(self, effects: list[object]) -> None:
        for message in told(effects, "p1"):  # type: ignore[arg-type]
            if isinstance(message, msg.Attach):
                self.asked.append(message.epoch)
            elif isinstance(message, msg.Detach):
                self.asked = [epoch for epoch in self.asked if epoch != message.epoch]

    @property
    def prefill(self):  # type: ignore[no-untyped-def]
        return self.members.get("p1")

    def possible(self, action: str) -> bool:
        if action.startswith("attach"):
            return bool(self.asked)
        return action != "push fails" or "d1" in self.prefill.attached

    def do(self, action: str) -> None:
        match action:
            case "attached":
                epoch, self.asked = self.asked[-1], []
                report = msg.Attached("d1", epoch, "frames_tcp", 0.0, "")
                self.members.attached(self.prefill, report, self.now)
            case "attach fails" | "push fails":
                epoch = self.asked[-1] if action == "attach fails" else self.epoch
                self.asked = [] if action == "attach fails" else self.asked
                lost = msg.WayLost("d1", epoch, "no way", ())
                if self.members.current(lost):
                    self.members.way_lost(self.prefill, lost, self.now, moved=0)
            case "decode restarts":
                self.lives += 1
                self.epoch = f"d1/{self.lives}"
                self.hear(self.members.remove("d1", proven_dead=True))
                self.hear(self.members.join(hello("d1", epoch=self.epoch), self.now))
            case "prefill restarts":
                self.asked = []
                self.members.remove("p1", proven_dead=True)
                self.hear(self.members.join(hello("p1"), self.now))
            case "time":
                self.now += max(0.0, min(self.members.ways.due(self.now), MOST_S))
                self.hear(self.members.attach_again(self.now))

    def check(self) -> None:
        prefill, ways = self.prefill, self.members.ways
        assert not ("d1" in prefill.attached and "d1" in prefill.failed)
        scheduled = ways.again_in("p1", "d1", self.now) is not None
        if "d1" in prefill.attached:
            assert not scheduled
        else:  # somebody is about to do something about it, and one of both only
            assert scheduled != bool(self.asked), (scheduled, self.asked)
        if scheduled:
            assert "d1" in prefill.failed
            assert ways.due(self.now) <= MOST_S
        assert len(ways) <= 1
        assert all(epoch == self.epoch for epoch in self.asked)


def after(order: tuple[str, ...]) -> Table:
    table = Table()
    for action in order:
        table.do(action)
    return table


def orders(order: tuple[str, ...], length: int) -> Iterator[Table]:
    """The table after every possible order of at most so many events that begins so."""
    table = after(order)
    yield table
    for action in ACTIONS if len(order) < length else ():
        if table.possible(action):
            yield from orders((*order, action), length)


def test_no_order_of_events_leaves_a_way_that_nobody_tries() -> None:
    reached: set[tuple[bool, bool, bool]] = set()
    for table in orders((), 5):
        table.check()
        prefill = table.prefill
        reached.add(("d1" in prefill.attached, "d1" in prefill.failed, bool(table.asked)))
    assert reached == {
        (True, False, False), (False, True, False), (False, True, True), (False, False, True)
    }  # fmt: skip


def test_a_way_is_tried_later_and_later_and_begins_anew_once_it_was_steady() -> None:
    ways, now = Ways(), 0.0
    waits = []
    for _ in range(7):
        waits.append(ways.failed("p", "d", now))
        now += waits[-1]
        assert ways.to_try(now) == [("p", "d")]
        assert ways.to_try(now) == []
        ways.opened("p", "d", now)
    assert waits == [FIRST_S, 1.0, 2.0, 4.0, 8.0, MOST_S, MOST_S]
    assert ways.failed("p", "d", now + STEADY_S - 0.1) == MOST_S
    ways.to_try(now + 100)
    ways.opened("p", "d", now + 100)
    assert ways.failed("p", "d", now + 100 + STEADY_S) == FIRST_S


def test_a_failure_that_both_ends_tell_counts_once() -> None:
    ways = Ways()
    assert ways.failed("p", "d", 0.0) == FIRST_S
    assert ways.failed("p", "d", 0.2) == pytest.approx(FIRST_S - 0.2)
    assert ways.to_try(FIRST_S) == [("p", "d")]
    ways.forget("d")
    assert (len(ways), ways.to_try(99.0)) == (0, [])


# ---- the router


def two_by_two() -> Desk:
    return Desk("d1", "d2", "p1", "p2")


def beat(desk: Desk) -> None:
    for member in desk.router.workers:
        desk.hear(member.worker, msg.Heartbeat(member.hello.epoch, 1))


def lose(desk: Desk, prefill: str, decode: str, *runs: str) -> list[object]:
    return desk.hear(prefill, msg.WayLost(decode, f"{decode}/0", "it took nothing", runs))  # type: ignore[return-value]


def test_a_fill_on_a_way_that_fails_begins_again_elsewhere_and_it_is_no_try() -> None:
    desk = two_by_two()
    desk.submit("a")
    ((decode, _),) = sent(desk.step(), msg.Reserve)
    desk.hear(decode, msg.Reserved(desk.grant("a#0", decode)))
    ((prefill, _),) = sent(desk.step(), msg.Fill)
    effects = lose(desk, prefill, decode, "a#0")
    assert sent(effects, msg.Drop) == [(prefill, msg.Drop("a#0"))]  # type: ignore[arg-type]
    assert sent(effects, msg.Cancel) == [(decode, msg.Cancel("a#0", prefill))]  # type: ignore[arg-type]
    entry = desk.router.ledger.entry("a")
    assert (entry.state, entry.tries.refills, entry.tries.detours) == (State.QUEUED, 0, 1)
    assert sent(desk.hear(prefill, msg.Released("a#0")), msg.Released)
    (again,) = sent(desk.step(), msg.Reserve)
    desk.hear(again[0], msg.Reserved(desk.grant("a#1", again[0])))
    ((other, _),) = sent(desk.step(), msg.Fill)
    assert (other, again[0]) != (prefill, decode)
    assert desk.hear(prefill, msg.FillFailed("a#0", "there is no link")) == []
    assert desk.state("a") is State.FILLING


def test_placement_avoids_a_way_that_is_down_until_it_is_attached_again() -> None:
    desk = two_by_two()
    lose(desk, "p1", "d1")
    lose(desk, "p2", "d1")
    for name in "abc":
        desk.submit(name)
    assert {peer for peer, _ in sent(desk.step(), msg.Reserve)} == {"d2"}
    desk.now = FIRST_S
    attaches = sent(desk.step(), msg.Attach)
    assert [(peer, order.worker) for peer, order in attaches] == [("p1", "d1"), ("p2", "d1")]  # type: ignore[attr-defined]
    assert not sent(desk.step(), msg.Attach)
    assert sent(
        desk.hear("p1", msg.Attached("d1", "d1/0", "frames_tcp", 0.0, "")), msg.WriterJoined
    )
    desk.submit("d")
    assert [peer for peer, _ in sent(desk.step(), msg.Reserve)] == ["d1"]


def test_an_idle_router_wakes_up_to_try_a_way_again() -> None:
    desk = two_by_two()
    desk.step()
    lose(desk, "p1", "d1")
    assert desk.router.due(desk.now) == pytest.approx(FIRST_S)


def test_what_was_sent_and_perhaps_never_came_is_filled_again_if_it_gave_no_token_yet() -> None:
    desk = Desk()
    desk.to_decoding("a")
    desk.to_decoding("b")
    desk.hear("d1", msg.Decoded((msg.RunTokens("b#1", 3, (5,)),)))
    effects = lose(desk, "p1", "d1", "a#0", "b#1", "unknown#9")
    assert sent(effects, msg.Cancel) == [("d1", msg.Cancel("a#0"))]  # type: ignore[arg-type]
    assert desk.state("a") is State.QUEUED
    assert desk.state("b") is State.DECODING


def test_kv_that_never_came_marks_its_way_and_damaged_kv_does_not() -> None:
    desk = two_by_two()
    for name, missing in (("a", False), ("b", True)):
        desk.submit(name)
        ((decode, _),) = sent(desk.step(), msg.Reserve)
        run = desk.run(name)
        desk.hear(decode, msg.Reserved(desk.grant(run, decode)))
        ((prefill, _),) = sent(desk.step(), msg.Fill)
        desk.hear(prefill, msg.Filled(run, RECEIPT, 0.0))
        desk.hear(decode, msg.FillRefused(run, "why", missing))
        member = desk.router.workers.get(prefill)
        assert member is not None
        assert (decode in member.failed) == missing
        tries = desk.router.ledger.entry(name).tries
        assert (tries.refills, tries.detours) == ((0, 1) if missing else (1, 0))
        desk.hear("client", msg.Abort(name))


def test_a_request_whose_ways_fail_again_and_again_is_filled_by_decode() -> None:
    desk = Desk()
    for turn in range(LOCAL_AFTER_DETOURS):
        if turn:
            desk.hear("p1", msg.Attached("d1", "d1/0", "frames_tcp", 0.0, ""))
        else:
            desk.submit("a")
        assert sent(desk.step(), msg.Reserve)
        run = desk.run("a")
        desk.hear("d1", msg.Reserved(desk.grant(run)))
        assert sent(desk.step(), msg.Fill)
        lose(desk, "p1", "d1", run)
    desk.hear("p1", msg.Attached("d1", "d1/0", "frames_tcp", 0.0, ""))
    desk.step()
    desk.hear("d1", msg.Reserved(desk.grant(desk.run("a"))))
    assert [order.receipt for _, order in sent(desk.step(), msg.Start)] == [None]  # type: ignore[attr-defined]


def test_a_faulty_worker_that_names_a_run_twice_ends_nothing() -> None:
    desk = Desk()
    desk.to_decoding("a")
    assert sent(lose(desk, "p1", "d1", "a#0", "a#0"), msg.Cancel)
    assert desk.router.ledger.entry("a").tries.detours == 1


def test_a_way_that_is_down_needs_no_second_word_from_its_other_end() -> None:
    """Else it would be attached twice at once, and the second Attached would clear a writer at work."""
    desk = Desk()
    desk.to_decoding("a")
    desk.to_decoding("b")
    desk.hear("d1", msg.FillRefused("a#0", "it did not arrive", True))
    desk.now = FIRST_S
    assert len(sent(desk.step(), msg.Attach)) == 1
    desk.hear("d1", msg.FillRefused("b#1", "it did not arrive", True))
    desk.now += MOST_S
    assert not sent(desk.step(), msg.Attach)


def test_blocks_that_were_granted_before_a_way_was_lost_are_not_filled_by_it_when_it_is_back() -> (
    None
):
    desk = Desk()
    desk.submit("a")
    assert sent(desk.step(), msg.Reserve)
    desk.hear("d1", msg.Reserved(desk.grant("a#0")))
    lose(desk, "p1", "d1")
    desk.hear("p1", msg.Attached("d1", "d1/0", "frames_tcp", 0.0, ""))
    effects = desk.step()
    assert not [order for _, order in sent(effects, msg.Fill) if order.grant.run == "a#0"]  # type: ignore[attr-defined]
    assert desk.run("a") != "a#0" or desk.state("a") is State.QUEUED


def test_a_request_for_whose_pool_all_ways_are_down_does_not_stop_the_line() -> None:
    """Only d1 is large enough for it: d1 fills the prompt itself."""
    desk = Desk("p1")
    for decode, blocks in (("d1", 64), ("d2", 2)):
        desk.pool = blocks
        desk.join(decode)
    for decode in ("d1", "d2"):
        desk.hear("p1", msg.Attached(decode, f"{decode}/0", "frames_tcp", 0.0, ""))
    lose(desk, "p1", "d1")
    desk.submit("long", length=40)
    ((decode, _),) = sent(desk.step(), msg.Reserve)
    assert decode == "d1"
    size = desk.router.workers.block_size
    reserved = desk.router.ledger.entry("long").reserved
    blocks = tuple(range(-(-reserved // size)))
    desk.hear("d1", msg.Reserved(replace(desk.grant("long#0", "d1"), blocks=blocks)))
    assert [order.receipt for _, order in sent(desk.step(), msg.Start)] == [None]  # type: ignore[attr-defined]


def test_a_way_that_is_down_is_said_in_cluster_info_whether_others_work_or_not() -> None:
    desk = Desk("d1", "p1", "p2")
    lose(desk, "p1", "d1")
    info = desk.router.info(desk.now)
    assert info.ready
    assert "p1 cannot write to d1: it took nothing; tried again" in info.degraded
    assert FILLING_THEMSELVES not in info.degraded
    lose(desk, "p2", "d1")
    assert FILLING_THEMSELVES in desk.router.info(desk.now).degraded
    for prefill in ("p1", "p2"):
        desk.hear(prefill, msg.Attached("d1", "d1/0", "frames_tcp", 0.0, ""))
    assert desk.router.info(desk.now).degraded == ""


def test_joins_attaches_losses_and_moves_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "router"):
        desk = Desk()
        desk.to_filling()
        lose(desk, "p1", "d1", "a#0")
        lose(desk, "p1", "d1")
        desk.hear("p1", msg.Attached("d1", "d1/0", "frames_tcp", 0.0, ""))
        desk.hear("d1", msg.Exited("d1"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "d1 joined: decode worker on cpu, host here, pid 11",
        "p1 joined: prefill worker on cpu, host here, pid 11",
        "p1 can write to d1, by shm",
        "p1 cannot write to d1: it took nothing; tried again in 0.5 s; 1 fills begin again",
        "p1 can write to d1 again, by frames_tcp",
        "d1 has died",
    ]


# ---- a town whose ways flap


class SlowWays(PretendPrefill):
    """Sends by couriers: while a way is cut nothing arrives, and it is lost after some time."""

    PATIENCE_S = 2.0

    def __init__(self, town: "FlappingTown") -> None:
        super().__init__(town)
        self.index = len(town.prefill_models)
        self.news: list[News] = []
        self.epochs: dict[str, str] = {}
        self.stalled_since: dict[str, float] = {}
        self.held: list[tuple[Grant, int]] = []  # computed, on the way

    def cut(self, worker: str) -> bool:
        return (self.index, worker.partition(".")[0]) in self.town.cut  # type: ignore[attr-defined]

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached | None:  # type: ignore[override]
        self.detach(worker)
        if self.cut(worker):
            self.news.append(msg.AttachFailed(worker, epoch, "no answer"))
            return None
        self.epochs[worker] = epoch
        attached = super().attach(worker, epoch, regions)
        self.news.append(attached)
        return None

    def detach(self, worker: str) -> None:
        super().detach(worker)
        self.stalled_since.pop(worker, None)
        self.held = [(g, tokens) for g, tokens in self.held if g.worker != worker]

    @property
    def waits(self) -> bool:  # type: ignore[override]
        return bool(self.held or self.news)

    def takes(self, worker: str) -> bool:
        return not self.cut(worker)

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        if worker in self.town.memories:  # a dead one is noticed later
            super().fill(worker, chunks)

    def finish(self, grant: Grant, tokens: int) -> Receipt | None:  # type: ignore[override]
        self.held.append((grant, tokens))
        return None

    def abandon(self, grant: Grant) -> None:
        self.held = [(g, tokens) for g, tokens in self.held if g != grant]

    def poll(self) -> list[News]:
        news, self.news = self.news, []
        now = self.town.now
        for worker in list(self.pools):
            if not self.cut(worker):
                self.stalled_since.pop(worker, None)
            elif self.stalled_since.setdefault(worker, now) <= now - self.PATIENCE_S:
                lost = msg.WayLost(worker, self.epochs[worker], "took nothing", ())
                self.detach(worker)
                news.append(lost)
        for grant, tokens in list(self.held):
            if self.cut(grant.worker) and self.town.dice.random() < 0.5:  # type: ignore[attr-defined]
                continue  # else it fits the buffers, and never arrives
            self.held.remove((grant, tokens))
            receipt = Receipt(0, b"", 0.0, "frames")
            if not self.cut(grant.worker):
                receipt = super().finish(grant, tokens)
            news.append(Sent(grant.run, receipt))
        return news


class Missing(PretendDecode):
    """What is not there has never come."""

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        found = super().arrival(grant, receipt, tokens)
        return Arrival.LOST if found is Arrival.BAD else found


class FlappingTown(Town):
    transport = "frames_tcp"
    prefill_model = SlowWays
    decode_model = Missing

    def __init__(self, seed: int, **options: object) -> None:
        self.dice = random.Random(seed)
        self.cut: set[tuple[int, str]] = set()  # (number of a prefill model, decode worker)
        super().__init__(**options)  # type: ignore[arg-type]


def ask(town: Town, count: int) -> dict[str, tuple[int, ...]]:
    prompts = {f"r{i}": tuple(range(20 * i + 1, 20 * i + 12 + i)) for i in range(count)}
    for name, prompt in prompts.items():
        town.submit(name, prompt, 5)
    return prompts


def assert_right(town: Town, prompts: dict[str, tuple[int, ...]]) -> None:
    for name, prompt in prompts.items():
        outcome = town.outcomes[name]
        assert (outcome.tokens, outcome.ends[0]) == calm_answer(prompt, 5), outcome


@pytest.mark.parametrize("seed", range(6))
def test_whatever_ways_flap_nothing_is_lost_and_no_try_is_counted(seed: int) -> None:
    town = FlappingTown(seed, prefills=2, decodes=2, patience_s=30.0)
    dice = random.Random(seed)
    pairs = list(product(range(2), ("decode-0", "decode-1")))
    town.run(lambda: all(len(m.pools) == 2 for m in town.prefill_models))
    prompts = ask(town, 8)
    next_change = 0.0

    def over() -> bool:
        nonlocal next_change
        if town.now >= next_change:
            next_change = town.now + dice.choice([0.1, 0.5, 3.0])
            town.cut = set(dice.sample(pairs, dice.randint(0, 4)))
        return all(town.outcomes[name].ends for name in prompts)

    town.run(over, turns=60_000)
    town.cut = set()
    town.settle()
    assert_right(town, prompts)
    town.run(lambda: all(len(m.attached) == 2 for m in town.router.workers.of(PREFILL)), 60_000)


def test_one_way_that_is_cut_holds_up_only_what_is_on_it() -> None:
    """Before the loss is noticed: requests for the other decode worker end meanwhile."""
    town = FlappingTown(1, prefills=1, decodes=2, patience_s=30.0)
    town.run(lambda: len(town.prefill_models[0].pools) == 2)
    town.cut = {(0, "decode-0")}
    began = town.now
    prompts = ask(town, 4)
    town.run(lambda: sum(bool(town.outcomes[name].ends) for name in prompts) >= 2, 60_000)
    assert town.now - began < SlowWays.PATIENCE_S
    town.run_all(prompts)
    assert_right(town, prompts)
    assert "decode-0" in town.router.info(town.now).degraded
    assert isinstance(town.router, Router)


def test_a_decode_worker_that_joins_while_its_way_is_down_is_attached_when_it_is_up() -> None:
    town = FlappingTown(1, prefills=1, decodes=1, patience_s=30.0)
    town.cut = {(0, "decode-1")}
    town.run(lambda: len(town.prefill_models[0].pools) == 1)
    name = town.start_worker("decode", 1)
    town.run(lambda: f"cannot write to {name}: no answer" in town.router.info(town.now).degraded)
    down_at = town.now
    town.run(lambda: town.now > down_at + 20 * BEAT_S, 60_000)
    town.cut = set()
    up_at = town.now
    town.run(lambda: town.router.info(town.now).degraded == "", 60_000)
    assert town.now - up_at <= MOST_S + 1.0
