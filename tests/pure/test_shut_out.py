"""Transports whose writes may land long after their writer has given up: no late write hits a block that
somebody else holds, and no block waits for ever."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest

from baton.errors import InputError
from baton.kv import transports
from baton.kv.blocks import BlockTable
from baton.kv.grant import Grant
from baton.kv.region import Receipt, Region
from baton.kv.transports import TRANSPORTS, check_installed, selects, shuts_out
from baton.wire import messages as msg
from baton.wire.node import ROUTER, To
from decode_worker.worker import DecodeWorker
from prefill_worker.model import Chunk, News, Sent, Stopped
from prefill_worker.worker import PrefillWorker
from router.workers import PREFILL
from tests.pure.desk import Desk, sent
from tests.pure.test_ways import FlappingTown, Missing, SlowWays, ask, assert_right, lose
from tests.pure.test_workers import hello
from tests.pure.town import PretendPrefill, Town

GRANT = Grant("d0", "e", "r1#0", 1, (1, 2))


# ---- what is chosen


def test_what_sends_clear_text_to_other_hosts_is_used_only_by_name() -> None:
    assert [each.name for each in TRANSPORTS if not selects("auto", each.name)] == ["nixl"]
    assert [each.name for each in TRANSPORTS if selects("nixl", each.name)] == ["nixl"]


def test_a_transport_whose_package_is_missing_is_refused_by_the_name_of_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transports, "find_spec", lambda name: None)
    for choice in transports.CHOICES:
        if choice != "nixl":
            check_installed(choice)
    with pytest.raises(InputError, match="extra 'nixl', or nixl-cu13 or nixl-cu12 by pip"):
        check_installed("nixl")
    monkeypatch.setattr(transports, "find_spec", lambda name: name == "nixl_cu12" or None)
    check_installed("nixl")


# ---- the prefill worker: when it says that it has stopped


class Pending(PretendPrefill):
    """Stops later than it is asked to."""

    def __init__(self) -> None:
        self.news: list[News] = []

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
        return msg.Attached(worker, epoch, "nixl", 0.0, "")

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        return True

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        pass

    def finish(self, grant: Grant, tokens: int) -> Receipt | None:  # type: ignore[override]
        return None

    def abandon(self, grant: Grant) -> bool:  # type: ignore[override]
        return True

    def poll(self) -> list[News]:
        news, self.news = self.news, []
        return news

    def clock(self) -> float:
        return 0.0


def filling() -> tuple[PrefillWorker, Pending]:
    model = Pending()
    node = PrefillWorker(hello("p1"), model, token_budget=64)
    node.step(0.0)
    node.handle(ROUTER, msg.Welcome("router/1", "here", 1), 0.0)
    node.handle(ROUTER, msg.Attach("d0", "e", ()), 0.0)
    node.handle(ROUTER, msg.Fill(GRANT, tuple(range(2 * 16))), 0.0)
    node.step(0.0)
    return node, model


def said(effects: Sequence[object], *kinds: type) -> list[msg.Message]:
    return [e.message for e in effects if isinstance(e, To) and isinstance(e.message, kinds)]


def test_drop_is_answered_when_nothing_is_written_any_more() -> None:
    node, model = filling()
    for _ in range(2):
        assert said(node.handle(ROUTER, msg.Drop(GRANT.run), 0.0), msg.Released) == []
    assert said(node.step(0.1), msg.Released) == []
    model.news = [Stopped(GRANT.run)]
    assert said(node.step(0.2), msg.Released) == [msg.Released(GRANT.run)]
    assert said(node.handle(ROUTER, msg.Drop(GRANT.run), 0.3), msg.Released) != []


def test_a_lost_way_is_told_before_released_so_that_it_is_shut_out_first() -> None:
    node, model = filling()
    node.handle(ROUTER, msg.Drop(GRANT.run), 0.0)
    model.news = [msg.WayLost("d0", "e", "cut", ())]
    told = said(node.step(0.1), msg.WayLost, msg.Released)
    assert [type(each) for each in told] == [msg.WayLost, msg.Released]


def test_a_fill_that_was_sent_before_it_was_dropped_is_still_stopped() -> None:
    node, model = filling()
    node.handle(ROUTER, msg.Drop(GRANT.run), 0.0)
    model.news = [Sent(GRANT.run, Receipt(1, b"", 0.0, "nixl")), Stopped(GRANT.run)]
    assert said(node.step(0.1), msg.Filled, msg.Released) == [msg.Released(GRANT.run)]


# ---- the router: whom it has shut out


@pytest.mark.parametrize("transport", [each.name for each in TRANSPORTS])
def test_a_lost_way_is_shut_out_after_its_runs_are_cancelled(transport: str) -> None:
    desk = Desk()
    desk.hear("p1", msg.Attached("d1", "d1/0", transport, 0.0, ""))
    desk.to_filling()
    orders = lose(desk, "p1", "d1")
    there = [type(e.message) for e in orders if isinstance(e, To) and e.peer == "d1"]
    assert there == [msg.Cancel] + [msg.WriterClear] * shuts_out(transport)


@pytest.mark.parametrize("transport", ["shm", "nixl"])
def test_a_silent_writer_is_shut_out_where_that_is_possible(transport: str) -> None:
    desk = Desk()
    desk.hear("p1", msg.Attached("d1", "d1/0", transport, 0.0, ""))
    orders = desk.router.workers.remove("p1", proven_dead=False)
    assert sent(orders, msg.WriterClear) == (
        [("d1", msg.WriterClear("p1"))] if transport == "nixl" else []
    )


# ---- a town whose writes land late


@dataclass(frozen=True)
class Write:
    """On its way to a decode worker's memory."""

    worker: str
    grant: Grant
    land: Callable[[], None]


class LateWays(SlowWays):
    """What it writes flies for a while. A way that is given up while it is cut leaves its writes adrift:
    they may land at any time, until the decode worker shuts this writer out."""

    town: "LateTown"

    def __init__(self, town: "LateTown") -> None:
        super().__init__(town)
        self.flying: list[Write] = []
        self.adrift: list[Write] = []
        self.stopping: list[Grant] = []
        self.shut: set[str] = set()  # ways whose door was closed

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached | None:  # type: ignore[override]
        attached = super().attach(worker, epoch, regions)
        self.shut.discard(worker)
        if not self.cut(worker):  # a new door: the owner closes the old one
            self.adrift = [write for write in self.adrift if write.worker != worker]
        return attached

    def detach(self, worker: str) -> None:
        if self.cut(worker):
            self.adrift += [write for write in self.flying if write.worker == worker]
        self.flying = [write for write in self.flying if write.worker != worker]
        self.stopping = [grant for grant in self.stopping if grant.worker != worker]
        super().detach(worker)

    @property
    def waits(self) -> bool:  # type: ignore[override]
        return True

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        if worker not in self.pools or worker not in self.town.memories:
            return
        for chunk in chunks:
            self.flying.append(Write(worker, chunk.grant, partial(self._land, worker, chunk)))

    def _land(self, worker: str, chunk: Chunk) -> None:
        if (memory := self.town.memories.get(worker)) is not None:
            for offset, token in enumerate(chunk.token_ids):
                memory.write(chunk.grant.table, chunk.start + offset, token)

    def abandon(self, grant: Grant) -> bool:  # type: ignore[override]
        super().abandon(grant)
        if grant.worker not in self.pools:
            return False
        self.stopping.append(grant)
        return True

    def poll(self) -> list[News]:
        news, self.news = self.news, []
        for worker in list(self.pools):
            if not self.cut(worker):
                self.stalled_since.pop(worker, None)
            since = (
                self.stalled_since.setdefault(worker, self.town.now) if self.cut(worker) else None
            )
            if worker in self.shut or (
                since is not None and since <= self.town.now - self.PATIENCE_S
            ):
                self.shut.discard(worker)
                news.append(msg.WayLost(worker, self.epochs[worker], "took nothing", ()))
                self.detach(worker)
        self.flying = [w for w in self.flying if self.cut(w.worker) or not self.town.lands(w)]
        under_way = {write.grant.run for write in self.flying}
        for grant, tokens in list(self.held):
            if grant.run not in under_way and not self.cut(grant.worker):
                self.held.remove((grant, tokens))
                receipt = PretendPrefill.finish(self, grant, tokens)
                news.append(Sent(grant.run, receipt))
        for grant in [each for each in self.stopping if each.run not in under_way]:
            self.stopping.remove(grant)
            news.append(Stopped(grant.run))
        return news


class Guarded(Missing):
    """Has a door for each writer."""

    town: "LateTown"

    def __init__(self, town: "LateTown", memory: object) -> None:
        super().__init__(town, memory)  # type: ignore[arg-type]
        self.inside: set[str] = set()

    def let_in(self, writer: str) -> None:
        self.inside.add(writer)

    def shut_out(self, writer: str) -> None:
        if writer not in self.inside:
            return
        self.inside.discard(writer)
        here = next(n for n, m in self.town.memories.items() if m is self.memory)
        ways = self.town.ways_of[writer]
        ways.adrift = [write for write in ways.adrift if write.worker != here]
        ways.flying = [write for write in ways.flying if write.worker != here]
        ways.shut |= {here} & ways.pools.keys()


class LateTown(FlappingTown):
    transport = "nixl"
    prefill_model = LateWays
    decode_model = Guarded

    def __init__(self, seed: int, **options: object) -> None:
        self.ways_of: dict[str, LateWays] = {}
        super().__init__(seed, **options)

    def start_worker(self, role: str, index: int) -> str:
        name = super().start_worker(role, index)
        if role == "prefill":
            self.ways_of[name] = self.prefill_models[-1]  # type: ignore[assignment]
        return name

    def kill(self, name: str, *, restart: bool = True) -> None:
        if (ways := self.ways_of.get(name)) is not None:  # what the kernel holds goes on
            ways.adrift += ways.flying
            ways.flying = []
        super().kill(name, restart=restart)

    def lands(self, write: Write, chance: float = 0.1) -> bool:
        """By chance. Its run still holds the blocks, or they are in quarantine, whenever that is."""
        if self.dice.random() >= chance:
            return False
        node = self.nodes.get(write.worker)
        if isinstance(node, DecodeWorker) and node.table.epoch == write.grant.epoch:
            held = node.table._held.get(write.grant.run)
            kept = [each.run for each in node.table._quarantine]
            holds = held is not None and held.grant == write.grant
            assert holds or write.grant.run in kept, f"{write.grant} was written late"
        write.land()
        return True

    def drift(self) -> None:
        """What is adrift moves on."""
        for ways in self.ways_of.values():
            ways.adrift = [write for write in ways.adrift if not self.lands(write, 0.02)]


@pytest.mark.parametrize("seed", range(6))
def test_no_late_write_hits_a_block_of_another_run(seed: int) -> None:
    town = LateTown(seed, prefills=2, decodes=2, blocks=24, patience_s=5.0)
    dice = random.Random(seed)
    pairs = list(product(range(2), ("decode-0", "decode-1")))
    town.run(lambda: all(len(m.pools) == 2 for m in town.prefill_models))
    prompts = ask(town, 8)
    next_change = 0.0

    def over() -> bool:
        nonlocal next_change
        town.drift()
        crossing = {
            (ways.index, write.worker.partition(".")[0])
            for ways in town.ways_of.values()
            for write in ways.flying
        } - town.cut
        hit = crossing if dice.random() < 0.3 else set()
        if town.now >= next_change or hit:
            next_change = town.now + dice.choice([0.5, 2.5, 4.0])
            town.cut = set(dice.sample(pairs, dice.randint(0, 3))) | hit
            if dice.random() < 0.1:
                town.kill(dice.choice(town.workers("prefill")))
            if dice.random() < 0.2:
                town.client(msg.Abort(dice.choice(list(prompts))))
        return all(town.outcomes[name].ends for name in prompts)

    town.run(over, turns=60_000)
    town.cut = set()
    town.settle()
    ended = {n: p for n, p in prompts.items() if town.outcomes[n].ends[0] != "abort"}
    assert_right(town, ended)
    town.run(lambda: all(len(m.attached) == 2 for m in town.router.workers.of(PREFILL)), 60_000)
    for node in town.nodes.values():
        if isinstance(node, DecodeWorker):
            assert node.table.quarantined_blocks == 0


# ---- a writer of whose end nobody tells


class ElsewhereTown(Town):
    """Prefill workers on another host: decode watches none of them."""

    transport = "nixl"

    def turns(self, number: int) -> None:
        for _ in range(number):
            self.turn()


def filling_elsewhere() -> tuple[ElsewhereTown, str, str]:
    """Three prompts are being filled. The decode worker, the prefill worker."""
    town = ElsewhereTown(prefills=1, decodes=1, blocks=16)
    for i in range(3):
        town.submit(f"r{i}", list(range(2, 14)), 30)
    town.turns(12)
    (decode,), (prefill,) = town.workers("decode"), town.workers("prefill")
    town.watching.get(prefill, set()).discard(decode)
    return town, decode, prefill


def table_of(town: ElsewhereTown, decode: str) -> BlockTable:
    node = town.nodes[decode]
    assert isinstance(node, DecodeWorker)
    return node.table


def test_a_writer_that_dies_with_the_router_holds_no_block_for_ever() -> None:
    town, decode, prefill = filling_elsewhere()
    town.watching.pop(prefill, None)
    town.kill(prefill, restart=False)
    town.kill(ROUTER)
    town.start_worker("prefill", 0)
    town.turns(400)
    assert table_of(town, decode).quarantined_blocks == 0
    assert table_of(town, decode).idle


def test_a_writer_that_dies_while_decode_is_given_up_holds_no_block_for_ever() -> None:
    town, decode, prefill = filling_elsewhere()
    town.stalled.add(decode)
    while town.router.workers.get(decode) is not None:
        town.turn()
    town.kill(prefill)
    town.turns(30)
    town.stalled.clear()
    town.run_all(["r0", "r1", "r2"])
    assert [town.outcomes[f"r{i}"].ends for i in range(3)] == [["length"]] * 3
    assert table_of(town, decode).idle
