"""The adapters of a running cluster: loaded on all workers or on none, whatever joins, fails and dies."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.adapters.changes import NONE, Changes, Entry
from baton.adapters.identity import Adapter
from baton.errors import ModelError
from baton.wire import messages as msg
from baton.wire.node import To
from baton.wire.shelf import Keeper
from router.catalog import GRACE_S, LOAD_S, LOOK_S, Catalog
from tests.depth import deep
from tests.pure.test_membership import HELLO

SQL, LAW, NEW = Adapter("sql", "11"), Adapter("law", "22"), Adapter("sql", "33")
MOST = 3


def load(adapter: Adapter, *, replace: bool = False, request: str = "") -> msg.LoadAdapter:
    return msg.LoadAdapter(request or f"load {adapter.digest}", adapter, adapter.name, replace)


def unload(name: str) -> msg.UnloadAdapter:
    return msg.UnloadAdapter(f"unload {name}", name)


@dataclass
class Disk:
    """What the folders of a machine hold, by digest, and how many reads were begun."""

    holds: set[str] = field(default_factory=set)
    ready: bool = True


class DiskReading:
    def __init__(self, disk: Disk, entry: Entry, shelf: "DiskShelf") -> None:
        self.disk, self.entry, self.shelf = disk, entry, shelf

    @property
    def done(self) -> bool:
        return self.disk.ready

    def add(self) -> None:
        digest = self.entry.adapter.digest
        if self.entry.path and digest not in self.disk.holds:
            raise ModelError(f"adapter {self.entry.adapter.name}: it is not there")
        assert digest not in self.shelf.holds
        self.shelf.holds.add(digest)

    def give_up(self) -> None:
        pass


class DiskShelf:
    def __init__(self, disk: Disk, own: Iterable[Adapter]) -> None:
        self.disk, self.holds = disk, {each.digest for each in own}

    def read(self, entry: Entry) -> DiskReading:
        return DiskReading(self.disk, entry, self)

    def drop(self, digest: str) -> None:
        self.holds.remove(digest)


class Worker:
    """A worker's keeper, and the orders on their way to it and reports on their way back."""

    def __init__(self, name: str, role: str, disk: Disk, own: tuple[Adapter, ...]) -> None:
        self.name, self.role = name, role
        self.hello = HELLO.__class__(role, name, f"{name}/0", *_rest(HELLO), adapters=own)
        self.shelf = DiskShelf(disk, own)
        self.keeper = Keeper(self.hello, self.shelf)
        self.orders: list[Any] = []
        self.reports: list[Any] = []

    def read_order(self) -> None:
        self.say(self.keeper.use(self.orders.pop(0)))

    def step(self) -> None:
        self.say(self.keeper.step())

    def say(self, effects: list[Any]) -> None:
        self.reports += [each.message for each in effects]


def _rest(hello: msg.Hello) -> tuple[Any, ...]:
    return tuple(getattr(hello, name) for name in list(hello.__dataclass_fields__)[3:16])


class House:
    """A router's catalog and its workers. Messages are first in, first out for each worker."""

    def __init__(self, *roles: str, own: tuple[Adapter, ...] = (), updates: bool = True) -> None:
        self.own, self.updates = own, updates
        self.disk = Disk({SQL.digest, LAW.digest, NEW.digest})
        self.now = 0.0
        self.in_use: set[str] = set()
        self.workers: dict[str, Worker] = {}
        self.refused: dict[str, str] = {}
        self.answers: dict[str, msg.AdapterChanged] = {}
        self.boots = 0
        self.catalog = self.new_catalog()
        for role in roles:
            self.join(role)
        self.rest()

    def new_catalog(self) -> Catalog:
        return Catalog(self.own, model="m", updates=self.updates, most=MOST)

    def carry_out(self, effects: Iterable[Any]) -> None:
        for each in effects:
            assert isinstance(each, To)
            if isinstance(each.message, msg.AdapterChanged):
                assert each.message.request not in self.answers, "answered twice"
                self.answers[each.message.request] = each.message
            elif isinstance(each.message, msg.Refused):
                self.refused[each.peer] = each.message.why
                self.die(each.peer)
            elif each.peer in self.workers:
                self.workers[each.peer].orders.append(each.message)

    def join(self, role: str) -> Worker:
        self.boots += 1
        worker = Worker(f"{role}-{self.boots}", role, self.disk, self.own)
        self.workers[worker.name] = worker
        self.hello(worker)
        return worker

    def hello(self, worker: Worker) -> None:
        assert self.catalog.rejection(worker.hello) is None
        self.carry_out(self.catalog.joined(worker.hello, self.now))

    def die(self, name: str) -> None:
        if self.workers.pop(name, None):
            self.carry_out(self.catalog.left(name, self.now))

    def restart(self) -> None:
        """The router dies; workers say Hello to the next one, in their order."""
        self.catalog = self.new_catalog()
        for worker in self.workers.values():
            worker.orders.clear()
            worker.reports.clear()
            worker.keeper.start_anew()
            worker.hello = replaced(worker.hello, worker.keeper.changes)
        for worker in list(self.workers.values()):
            self.hello(worker)

    def ask(self, asked: msg.LoadAdapter | msg.UnloadAdapter) -> None:
        take = self.catalog.load if isinstance(asked, msg.LoadAdapter) else self.catalog.unload
        self.carry_out(take("client", asked, self.now))  # type: ignore[arg-type]
        self.carry_out(self.catalog.take_answers())

    def report(self, worker: Worker) -> None:
        said = worker.reports.pop(0)
        self.carry_out(self.catalog.report(worker.name, said, self.now))

    def step(self) -> None:
        for digest in self.catalog.lost():
            self.in_use.discard(digest)
            self.carry_out(self.catalog.forget(digest, self.now))
        self.carry_out(self.catalog.step(self.now, lambda: self.in_use))
        self.carry_out(self.catalog.take_answers())

    def rest(self) -> None:
        """Until nothing is on its way and nothing is due soon."""
        for _ in range(200):
            for worker in list(self.workers.values()):
                while worker.name in self.workers and (worker.orders or worker.reports):
                    if worker.orders:
                        worker.read_order()
                    else:
                        self.report(worker)
                worker.step()
            self.step()
            quiet = not any(w.orders or w.reports for w in self.workers.values())
            if quiet and self.catalog.due(self.now) > LOOK_S:
                return
            if quiet:
                self.now += LOOK_S
            if quiet and self.in_use:
                return
        raise AssertionError("it does not come to rest")

    def offered(self) -> list[str]:
        return [f"{each.name} {each.digest}" for each in self.catalog.offered]

    def held(self) -> list[set[str]]:
        return [worker.shelf.holds for worker in self.workers.values()]


def replaced(hello: msg.Hello, changes: Changes) -> msg.Hello:
    return hello.__class__(
        **{n: getattr(hello, n) for n in hello.__dataclass_fields__} | {"changes": changes}
    )


def test_it_is_offered_when_every_worker_holds_it_and_gone_when_no_request_needs_it() -> None:
    house = House("prefill", "decode", "decode")
    house.ask(load(SQL))
    assert house.offered() == []
    for worker in list(house.workers.values())[:2]:
        worker.read_order()
        worker.step()
        while worker.reports:
            house.report(worker)
    assert not house.answers
    house.rest()
    assert house.answers["load 11"].code == ""
    assert house.offered() == ["sql 11"]
    assert house.held() == [{"11"}] * 3
    house.in_use = {"11"}
    house.ask(unload("sql"))
    assert house.answers["unload sql"].code == ""
    assert house.offered() == []
    house.rest()
    assert house.held() == [{"11"}] * 3
    assert house.catalog.admitted == (SQL,)
    house.in_use = set()
    house.rest()
    assert house.held() == [set()] * 3
    assert house.catalog.admitted == ()


def test_a_worker_that_cannot_load_it_leaves_none_that_has() -> None:
    house = House("prefill", "decode")
    prefill, decode = house.workers.values()
    decode.shelf.disk = Disk()
    house.ask(load(SQL))
    house.rest()
    answer = house.answers["load 11"]
    assert answer.code == "invalid_request"
    assert answer.why == ("the adapter 'sql' is not loaded: decode-2: adapter sql: it is not there")
    assert house.held() == [set(), set()]
    assert (house.offered(), house.catalog.changes) == ([], NONE)
    assert prefill.name in house.workers
    decode.shelf.disk = house.disk  # the folder is put there, and it is tried again
    house.ask(load(SQL, request="again"))
    house.rest()
    assert house.answers["again"].code == ""


def test_the_failure_of_one_load_is_not_that_of_the_next() -> None:
    house = House("decode")
    (worker,) = house.workers.values()
    house.disk.holds.clear()
    house.ask(load(SQL))
    worker.read_order()
    worker.step()
    while worker.reports:
        house.report(worker)
    house.step()
    assert house.answers["load 11"].code == "invalid_request"
    house.disk.holds.add("11")
    house.ask(load(SQL, request="again"))  # before the worker has heard that the first is over
    assert "again" not in house.answers
    house.rest()
    assert (house.answers["again"].code, house.held()) == ("", [{"11"}])


@pytest.mark.parametrize("at", range(6))
def test_a_worker_that_dies_or_joins_meanwhile_changes_nothing(at: int) -> None:
    house = House("prefill", "decode", "decode")
    house.ask(load(SQL))
    died = list(house.workers.values())[at % 3]
    if at < 3:
        died.read_order()
        died.step()
    house.die(died.name)
    house.join(died.role)
    house.rest()
    assert house.answers["load 11"].code == ""
    assert house.held() == [{"11"}] * 3


def test_without_a_decode_worker_nothing_is_loaded() -> None:
    house = House("prefill")
    house.ask(load(SQL))
    assert house.answers["load 11"].code == "not_ready"
    house = House("prefill", "decode")
    house.ask(load(SQL))
    house.die("decode-2")
    house.rest()
    assert house.answers["load 11"].code == "not_ready"
    assert house.held() == [set()]


def test_a_load_that_takes_too_long_is_given_up_and_says_where() -> None:
    house = House("decode")
    house.disk.ready = False
    house.ask(load(SQL))
    house.rest()
    house.now += LOAD_S
    house.rest()
    answer = house.answers["load 11"]
    assert (answer.code, house.held()) == ("not_ready", [set()])
    assert "decode-1 did not load it within 600 s" in answer.why


def test_names_that_are_taken_limits_and_closed_routers_are_refused_by_name() -> None:
    house = House("decode", own=(LAW,))
    house.ask(load(SQL))
    house.ask(load(SQL, request="twice"))
    assert "is being loaded" in house.answers["twice"].why
    house.rest()
    house.ask(load(NEW))
    assert "an adapter 'sql' is loaded: unload it first" in house.answers["load 33"].why
    house.ask(load(Adapter("m", "44")))
    assert "the model's own name" in house.answers["load 44"].why
    house.disk.holds |= {"55", "66"}
    house.ask(load(Adapter("b", "55")))
    house.ask(load(Adapter("c", "66")))
    assert "there are 3 adapters, the limit of --max-loras" in house.answers["load 66"].why
    house.ask(unload("nobody"))
    assert house.answers["unload nobody"].code == "model_not_found"
    closed = House("decode", updates=False)
    closed.ask(load(SQL))
    closed.ask(unload("sql"))
    assert {each.code for each in closed.answers.values()} == {"invalid_request"}


def test_in_the_place_of_another_that_goes_on_until_its_requests_have_ended() -> None:
    house = House("prefill", "decode", own=(SQL,))
    house.in_use = {"11"}
    house.ask(load(NEW, replace=True))
    house.rest()
    assert house.offered() == ["sql 33"]
    assert house.held() == [{"11", "33"}] * 2
    house.in_use = set()
    house.rest()
    assert house.held() == [{"33"}] * 2
    late = house.join("decode")  # comes with the sql of its --lora
    house.rest()
    assert house.catalog.ready(late.name)
    assert late.shelf.holds == {"33"}
    house.ask(unload("sql"))
    house.rest()
    assert (house.offered(), house.held()) == ([], [set()] * 3)
    house.ask(load(SQL))  # and it comes back
    house.rest()
    assert (house.offered(), house.held()) == (["sql 11"], [{"11"}] * 3)


def test_a_worker_that_lacks_what_is_offered_gets_no_work_and_one_that_cannot_load_it_is_refused() -> (
    None
):
    house = House("prefill", "decode")
    house.ask(load(SQL))
    house.rest()
    late = house.join("decode")
    assert not house.catalog.ready(late.name)
    house.rest()
    assert house.catalog.ready(late.name)
    house.disk.holds.remove("11")
    lost = house.join("decode")
    house.rest()
    assert lost.name not in house.workers
    assert "offers adapter 'sql', which this worker cannot load" in house.refused[lost.name]
    assert house.offered() == ["sql 11"]
    house.ask(unload("sql"))
    house.rest()
    house.join("decode")
    house.rest()
    assert len(house.workers) == 4


def test_requests_with_replaced_adapters_limit_how_many_more_are_loaded() -> None:
    house = House("decode")
    adapters = [Adapter("sql", f"{number}") for number in range(10)]
    house.disk.holds |= {each.digest for each in adapters}
    for each in adapters:
        house.ask(load(each, replace=True))
        house.rest()
        house.in_use.add(each.digest)
    assert len(house.catalog.changes.leaving) == MOST
    refused = [each.why for each in house.answers.values() if each.code]
    assert len(refused) == 10 - MOST - 1
    assert all(f"requests still run with {MOST} adapters" in each for each in refused)
    house.in_use.clear()
    house.now += LOOK_S
    house.rest()
    house.ask(load(adapters[-1], replace=True, request="again"))
    house.rest()
    assert house.offered() == [f"sql {adapters[-1].digest}"]


def test_a_worker_that_joins_ends_no_request_that_another_one_can_serve() -> None:
    house = House("prefill", "decode")
    house.ask(load(SQL))
    house.rest()
    house.in_use = {"11"}
    house.ask(unload("sql"))
    house.disk.holds.clear()
    late = [house.join("decode"), house.join("prefill")]
    for worker in late:
        worker.read_order()
        worker.step()
        while worker.reports:
            house.report(worker)
    house.step()
    assert house.in_use == {"11"}
    assert [house.catalog.ready(each.name) for each in late] == [False, False]
    house.in_use.clear()
    house.rest()
    assert [house.catalog.ready(each.name) for each in late] == [True, True]
    assert not house.refused


def test_what_is_leaving_and_cannot_be_loaded_again_is_lost_with_its_requests() -> None:
    house = House("prefill", "decode")
    house.ask(load(SQL))
    house.rest()
    house.in_use = {"11"}
    house.ask(unload("sql"))
    house.disk.holds.clear()
    house.die("decode-2")
    late = house.join("decode")
    assert not house.catalog.ready(late.name)
    house.rest()
    assert house.in_use == set()
    assert house.catalog.ready(late.name)
    assert not house.refused


def test_the_next_router_learns_the_newest_from_workers_and_from_clients() -> None:
    house = House("prefill", "decode", own=(LAW,))
    house.ask(load(SQL))
    house.rest()
    house.in_use = {"22"}
    house.ask(unload("law"))
    for worker in house.workers.values():
        while worker.orders:
            worker.read_order()
    known = house.catalog.changes
    house.restart()
    assert house.offered() == ["sql 11"]
    assert house.catalog.admitted == (LAW, SQL)  # its request is on the way to this router
    house.in_use = set()
    house.step()
    assert house.catalog.admitted == (LAW, SQL)
    house.now += GRACE_S
    house.rest()
    assert (house.held(), house.catalog.admitted) == ([{"11"}] * 2, (SQL,))
    alone = House(own=(LAW,))
    alone.carry_out(alone.catalog.learn(known, 0.0))
    assert alone.offered() == ["sql 11"]
    other = House("decode", own=(LAW, NEW))  # started with another sql: its own option counts
    other.carry_out(other.catalog.learn(known, 0.0))
    assert other.offered() == ["sql 33"]
    closed = House("decode", own=(LAW,), updates=False)
    closed.carry_out(closed.catalog.learn(known, 0.0))
    assert closed.offered() == ["law 22"]


def test_a_router_that_dies_while_one_is_loaded_leaves_it_nowhere() -> None:
    house = House("prefill", "decode")
    house.ask(load(SQL))
    first = next(iter(house.workers.values()))
    first.read_order()
    first.step()
    assert first.shelf.holds == {"11"}
    house.restart()
    house.rest()
    assert (house.offered(), house.held()) == ([], [set()] * 2)


ADAPTERS = [SQL, LAW, NEW, Adapter("new", "11"), Adapter("other", "44")]


class Changing(RuleBasedStateMachine):
    """Anything in any order; and then everything comes to rest as it should."""

    def __init__(self) -> None:
        super().__init__()
        self.house = House("prefill", "decode", own=(LAW,))
        self.asked = 0
        self.lost = False  # a router with questions

    def worker(self, number: int) -> Worker | None:
        workers = list(self.house.workers.values())
        return workers[number % len(workers)] if workers else None

    @rule(which=st.sampled_from(ADAPTERS), replace=st.booleans())
    def loads(self, which: Adapter, replace: bool) -> None:
        self.asked += 1
        self.house.ask(load(which, replace=replace, request=f"{self.asked}"))

    @rule(which=st.sampled_from(ADAPTERS))
    def unloads(self, which: Adapter) -> None:
        self.asked += 1
        self.house.ask(msg.UnloadAdapter(f"{self.asked}", which.name))

    @rule(which=st.sampled_from(ADAPTERS))
    def a_request_runs(self, which: Adapter) -> None:
        if which in self.house.catalog.admitted:
            self.house.in_use.add(which.digest)

    @rule(which=st.sampled_from(ADAPTERS))
    def its_requests_end(self, which: Adapter) -> None:
        self.house.in_use.discard(which.digest)

    @rule(number=st.integers(0, 3))
    def reads(self, number: int) -> None:
        if (worker := self.worker(number)) and worker.orders:
            worker.read_order()

    @rule(number=st.integers(0, 3))
    def works(self, number: int) -> None:
        if worker := self.worker(number):
            worker.step()

    @rule(number=st.integers(0, 3))
    def is_heard(self, number: int) -> None:
        if (worker := self.worker(number)) and worker.reports:
            self.house.report(worker)

    @rule(number=st.integers(0, 3))
    def dies(self, number: int) -> None:
        if worker := self.worker(number):
            self.house.die(worker.name)

    @precondition(lambda self: len(self.house.workers) < 4)
    @rule(role=st.sampled_from(["prefill", "decode"]))
    def joins(self, role: str) -> None:
        self.house.join(role)

    @rule()
    def the_router_dies(self) -> None:
        self.house.answers |= {f"{n}": msg.AdapterChanged("") for n in range(1, self.asked + 1)}
        self.house.restart()

    @rule(which=st.sampled_from(ADAPTERS))
    def a_folder_comes_or_goes(self, which: Adapter) -> None:
        self.house.disk.holds ^= {which.digest}

    @rule()
    def disks_are_slow_or_fast(self) -> None:
        self.house.disk.ready = not self.house.disk.ready

    @rule(seconds=st.sampled_from([0.0, LOOK_S, GRACE_S, LOAD_S]))
    def time_passes(self, seconds: float) -> None:
        self.house.now += seconds
        self.house.step()

    @invariant()
    def what_can_get_work_holds_all_that_a_request_may_name(self) -> None:
        needed = {each.digest for each in self.house.catalog.admitted}
        for worker in self.house.workers.values():
            if self.house.catalog.ready(worker.name):
                assert needed <= worker.shelf.holds or worker.orders

    @invariant()
    def what_runs_is_kept(self) -> None:
        known = {each.digest for each in self.house.catalog.admitted}
        assert self.house.in_use <= known or self.house.catalog.changes.version == 0

    @invariant()
    def no_name_is_offered_twice_and_no_more_than_allowed(self) -> None:
        names = [each.name for each in self.house.catalog.offered]
        assert names == sorted(set(names))
        assert len(names) <= MOST

    def teardown(self) -> None:
        house = self.house
        house.disk.ready = True
        house.disk.holds |= {each.digest for each in ADAPTERS}
        house.in_use.clear()
        if not any(each.role == "decode" for each in house.workers.values()):
            house.join("decode")
        house.now += GRACE_S
        house.rest()
        assert set(house.answers) >= {f"{n}" for n in range(1, self.asked + 1)}
        offered = {each.digest for each in house.catalog.offered}
        assert all(held == offered for held in house.held())
        assert all(w.keeper.changes == house.catalog.changes for w in house.workers.values())


Changing.TestCase.settings = settings(
    max_examples=deep(2000, usual=60),
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestChanging = Changing.TestCase
