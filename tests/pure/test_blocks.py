"""Block ownership, explored: whatever happens in whatever order, a late write harms nobody."""

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.errors import RequestError
from baton.kv.blocks import ANY_WRITER, BlockTable
from baton.kv.grant import Grant
from baton.params import GenerationParams
from baton.wire import messages as msg
from baton.wire.node import ROUTER, To
from decode_worker.worker import LEASE_S as DECODE_LEASE_S
from decode_worker.worker import DecodeWorker
from tests.pure.town import GREEDY, Town

LEASE_S = 10.0


def table_of(blocks: int, *writers: str) -> BlockTable:
    table = BlockTable("d", "d/0", blocks, LEASE_S)
    for writer in writers:
        table.writer_joined(writer)
    return table


# ---- the rules, one by one


def test_a_grant_names_blocks_that_nobody_else_has() -> None:
    table = table_of(8)
    first, second = table.reserve("a", 3, 0.0), table.reserve("b", 5, 0.0)
    assert first is not None
    assert second is not None
    assert sorted(first.blocks + second.blocks) == list(range(8))
    assert first.generation != second.generation
    assert table.reserve("c", 1, 0.0) is None


def test_a_request_the_pool_can_never_hold_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"needs 9 KV blocks and the pool has 8") as caught:
        table_of(8).reserve("a", 9, 0.0)
    assert caught.value.code == "context_length_exceeded"


def test_a_run_reserves_once() -> None:
    table = table_of(8)
    table.reserve("a", 1, 0.0)
    with pytest.raises(AssertionError, match="holds blocks already"):
        table.reserve("a", 1, 0.0)


def test_a_lease_runs_out_at_its_time_unless_renewed() -> None:
    table = table_of(8)
    table.reserve("a", 1, 0.0)
    table.reserve("b", 1, 0.0)
    table.renew("b", 5.0)
    assert table.expired(LEASE_S - 0.001) == []
    assert table.expired(LEASE_S) == ["a"]
    assert table.expired(LEASE_S + 5.0) == ["a", "b"]


def test_a_started_run_has_no_lease_and_cannot_get_one_back() -> None:
    table = table_of(8)
    table.reserve("a", 1, 0.0)
    assert table.start("a") is not None
    table.renew("a", 1.0)
    assert table.expired(1e9) == []


def test_a_run_that_holds_nothing_cannot_start() -> None:
    table = table_of(8)
    assert table.start("a") is None
    table.reserve("a", 1, 0.0)
    table.release("a", None)
    assert table.start("a") is None


def test_a_started_run_grows_block_by_block_until_the_pool_is_full() -> None:
    table = table_of(5)
    table.reserve("a", 2, 0.0)
    table.reserve("b", 1, 0.0)
    table.start("a")
    grown = [table.grow("a"), table.grow("a")]
    assert len({*grown, None}) == 3
    assert table.grow("a") is None
    table.check()
    table.release("b", None)
    assert table.grow("a") is not None
    table.release("a", None)
    assert table.idle


def test_what_a_run_grew_by_waits_for_no_writer() -> None:
    table = table_of(4, "p")
    table.reserve("a", 2, 0.0)
    table.start("a")
    table.grow("a")
    table.release("a", "p")
    assert (table.quarantined_blocks, table.free_blocks) == (2, 2)
    table.check()


def test_releasing_twice_gives_the_blocks_back_once() -> None:
    table = table_of(4)
    table.reserve("a", 4, 0.0)
    assert table.release("a", None) is not None
    assert table.release("a", None) is None
    assert table.idle
    table.check()


def test_blocks_wait_for_the_writer_and_for_nobody_else() -> None:
    table = table_of(4, "p", "q")
    table.reserve("a", 4, 0.0)
    table.release("a", "p")
    assert (table.free_blocks, table.quarantined_blocks) == (0, 4)
    table.writer_released("q", "a")
    table.writer_released("p", "b")
    table.writer_clear("q")
    assert table.quarantined_blocks == 4
    table.writer_released("p", "a")
    assert table.idle


def test_a_writer_that_cannot_reach_the_pool_is_not_waited_for() -> None:
    table = table_of(4, "q")
    table.reserve("a", 4, 0.0)
    table.release("a", "p")
    assert table.idle


def test_an_unknown_writer_means_all_of_them() -> None:
    table = table_of(4, "p", "q")
    table.reserve("a", 4, 0.0)
    table.release("a", ANY_WRITER)
    table.writer_clear("p")
    assert table.quarantined_blocks == 4
    table.writer_released("q", "a")
    assert table.idle


def test_a_prefix_that_a_writer_may_still_read_is_not_evicted() -> None:
    table = table_of(4, "p")
    first = table.reserve("a", 2, 0.0)
    assert first is not None
    table.start("a")
    table.publish("a", (b"1", b"2"))
    table.release("a", None)
    second = table.reserve("b", 3, 0.0, (b"1", b"2"))
    assert second is not None
    assert second.prefix == first.blocks
    table.release("b", "p")
    table.check()
    assert (table.free_blocks, table.quarantined_blocks) == (1, 3)
    assert table.reserve("c", 2, 0.0) is None
    third = table.reserve("d", 2, 0.0, (b"1", b"2"))
    assert third is not None, "others may read it meanwhile"
    table.release("d", "p")
    assert table.quarantined_blocks == 3, "a block that two of them read is one"
    table.writer_released("p", "b")
    table.writer_released("p", "d")
    table.check()
    assert table.idle
    assert table.cached_blocks == 2


def test_blocks_that_nobody_was_to_write_leave_quarantine_with_the_cancel() -> None:
    table = table_of(4, "p", "q")
    table.reserve("a", 4, 0.0)
    table.release("a", ANY_WRITER)  # its lease ended, and the owner does not know who writes
    table.release("a", None)
    assert table.idle


def test_a_cancel_names_the_one_writer_that_expired_blocks_wait_for() -> None:
    table = table_of(4, "p", "q")
    table.reserve("a", 4, 0.0)
    table.release("a", ANY_WRITER)
    table.release("a", "p")
    table.writer_released("q", "a")
    assert table.quarantined_blocks == 4
    table.writer_released("p", "a")
    assert table.idle


def test_a_writer_that_comes_later_has_nothing_to_do_with_it() -> None:
    table = table_of(4, "p")
    table.reserve("a", 4, 0.0)
    table.release("a", ANY_WRITER)
    table.writer_joined("q")
    table.writer_clear("p")
    assert table.idle


def test_a_new_epoch_ends_every_run_and_waits_for_every_writer() -> None:
    table = table_of(4, "p", "q")
    table.reserve("a", 1, 0.0)
    table.reserve("b", 1, 0.0)
    table.start("b")
    ended = table.renew_epoch("d/1")
    assert sorted(grant.run for grant in ended) == ["a", "b"]
    assert table.quarantined_blocks == 2
    grant = table.reserve("c", 2, 0.0)
    assert grant is not None
    assert grant.epoch == "d/1"
    assert grant.generation > max(each.generation for each in ended)
    table.writer_clear("p")
    table.writer_clear("q")
    table.release("c", None)
    assert table.idle


def test_time_alone_frees_nothing_that_may_be_written_to() -> None:
    table = table_of(4, "p")
    table.reserve("a", 4, 0.0)
    for run in table.expired(1e6):
        table.release(run, ANY_WRITER)
    assert table.expired(1e12) == []
    assert table.quarantined_blocks == 4


def test_check_sees_a_block_in_two_hands_and_one_in_none() -> None:
    table = table_of(4)
    table.reserve("a", 1, 0.0)
    table._free.append(table._free[0])
    with pytest.raises(AssertionError, match="two owners, or none"):
        table.check()
    table = table_of(4)
    table._free.pop()
    with pytest.raises(AssertionError, match="two owners, or none"):
        table.check()


def test_a_decode_worker_takes_back_what_has_expired_and_says_so() -> None:
    town = Town()
    (worker,) = [node for node in town.nodes.values() if isinstance(node, DecodeWorker)]
    worker.handle(ROUTER, msg.Welcome("router/1", "here", 1), 0.0)
    worker.handle(ROUTER, msg.Welcome("router/1", "here", 1), 0.0)
    worker.handle(ROUTER, msg.Reserve("a#0", 12), 0.0)
    worker.handle(ROUTER, msg.Reserve("b#0", 12), 0.0)
    worker.handle(ROUTER, msg.Renew(("b#0",)), 1.0)
    worker.handle(ROUTER, msg.Heartbeat("router/1", 1), DECODE_LEASE_S)
    worker.handle(ROUTER, msg.Heartbeat("router/1", 1), DECODE_LEASE_S)
    assert To(ROUTER, msg.Expired("a#0")) in worker.step(DECODE_LEASE_S)
    assert list(worker.table._held) == ["b#0"]
    assert To(ROUTER, msg.FillRefused("a#0", "its lease on KV blocks ran out")) in worker.handle(
        ROUTER, msg.Start("a#0", (1, 2), 2, GenerationParams(1, GREEDY)), DECODE_LEASE_S
    )


# ---- a pool with writers that write when they like


@dataclass
class Pool:
    """The table, and writers that hold grants until they are told to drop them, and have.

    A write can happen at any time under any grant a writer still holds, so a pool is safe if no such
    grant shares a block with a run that somebody else fills or decodes.
    """

    table: BlockTable
    now: float = 0.0
    count: int = 0
    epochs: int = 0
    live: dict[str, Grant] = field(default_factory=dict)  # runs the router follows
    filled_by: dict[str, str] = field(default_factory=dict)
    open: dict[tuple[str, str], Grant] = field(default_factory=dict)  # (writer, run)

    def reserve(self, blocks: int) -> str | None:
        run = f"r#{self.count}"
        grant = self.table.reserve(run, blocks, self.now)
        if grant is None:
            return None
        self.count += 1
        self.live[run] = grant
        return run

    def fill(self, run: str, writer: str) -> None:
        self.open[writer, run] = self.live[run]
        self.filled_by[run] = writer

    def filled(self, run: str) -> None:
        """The writer's last word on this run; it starts."""
        self.open.pop((self.filled_by.pop(run), run), None)
        assert self.table.start(run) == self.live[run]

    def release(self, run: str) -> None:
        self.table.release(run, self.filled_by.pop(run, None))
        self.live.pop(run)

    def expire(self) -> None:
        for run in self.table.expired(self.now):
            self.table.release(run, ANY_WRITER)
            self.live.pop(run, None)
            self.filled_by.pop(run, None)

    def dropped(self, writer: str, run: str) -> None:
        """The writer has let go of a run that is over, and said so."""
        self.open.pop((writer, run), None)
        for each in self.table.writers.copy():  # the others never held it
            if (each, run) not in self.open:
                self.table.writer_released(each, run)

    def clear(self, writer: str) -> None:
        """The writer has died or started anew, and joins again."""
        for key in [key for key in self.open if key[0] == writer]:
            del self.open[key]
        for run in [run for run, by in self.filled_by.items() if by == writer]:
            self.release(run)  # LOST: the router takes the run back
        self.table.writer_clear(writer)
        self.table.writer_joined(writer)

    def renew_epoch(self) -> None:
        self.epochs += 1
        self.table.renew_epoch(f"d/{self.epochs}")
        self.live.clear()
        self.filled_by.clear()

    def check(self) -> None:
        self.table.check()
        for (_, run), grant in self.open.items():
            for other in self.live.values():
                shared = set(grant.blocks) & set(other.blocks)
                assert other.run == run or not shared, f"{run} can write into {other.run}"
            if run not in self.live:
                assert not set(grant.blocks) & set(self.table._free), f"{run} writes into free"


class PoolUnderFire(RuleBasedStateMachine):
    """Anything in any order, with two writers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(table_of(6, "p", "q"))

    def _pick(self, data: st.DataObject, runs: list[str]) -> str | None:
        return data.draw(st.sampled_from(sorted(runs))) if runs else None

    @rule(blocks=st.integers(1, 4))
    def reserve(self, blocks: int) -> None:
        self.pool.reserve(blocks)

    @rule(data=st.data(), writer=st.sampled_from("pq"))
    def fill(self, data: st.DataObject, writer: str) -> None:
        pool = self.pool
        waiting = [
            run for run in pool.live
            if run not in pool.filled_by and pool.table._held[run].lease_until is not None
        ]  # fmt: skip
        if run := self._pick(data, waiting):
            pool.fill(run, writer)

    @rule(data=st.data())
    def filled(self, data: st.DataObject) -> None:
        if run := self._pick(data, list(self.pool.filled_by)):
            self.pool.filled(run)

    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        table = self.pool.table
        started = [run for run in self.pool.live if table._held[run].lease_until is None]
        if run := self._pick(data, started):
            free = table.free_blocks
            block = table.grow(run)
            assert (block is None) == (free == 0)
            others = [b for other, g in self.pool.live.items() if other != run for b in g.table]
            assert block not in others

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if run := self._pick(data, list(self.pool.live)):
            self.pool.release(run)

    @rule(data=st.data())
    def dropped(self, data: st.DataObject) -> None:
        late = [(w, run) for w, run in self.pool.open if run not in self.pool.live]
        if late:
            self.pool.dropped(*data.draw(st.sampled_from(sorted(late))))

    @rule(writer=st.sampled_from("pq"))
    def clear(self, writer: str) -> None:
        self.pool.clear(writer)

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        if run := self._pick(data, list(self.pool.live)):
            self.pool.table.renew(run, self.pool.now)

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        self.pool.now += seconds
        self.pool.expire()

    @rule()
    def renew_epoch(self) -> None:
        self.pool.renew_epoch()

    @invariant()
    def safe(self) -> None:
        self.pool.check()

    def teardown(self) -> None:
        for run in list(self.pool.live):
            self.pool.release(run)
        for writer in ("p", "q"):
            self.pool.clear(writer)
        self.pool.check()
        assert self.pool.table.idle, "blocks have leaked"


TestPoolUnderFire = PoolUnderFire.TestCase
TestPoolUnderFire.settings = settings(max_examples=60, stateful_step_count=40)


def test_every_order_of_events_for_three_runs_and_one_writer_is_safe() -> None:
    """Depth first through everything that can happen in ten events, on a pool of two blocks."""
    seen: set[str] = set()

    def fingerprint(pool: Pool) -> str:
        return repr((pool.table, pool.live, pool.filled_by, sorted(pool.open.items())))

    def options(pool: Pool) -> list[tuple[str, ...]]:
        events: list[tuple[str, ...]] = []
        if pool.count < 3:
            events.append(("reserve",))
        for run in pool.live:
            held = pool.table._held[run]
            if run not in pool.filled_by and held.lease_until is not None:
                events.append(("fill", run))
            if run in pool.filled_by:
                events.append(("filled", run))
            events.append(("release", run))
        events += [("dropped", run) for _, run in pool.open if run not in pool.live]
        return [*events, ("clear",), ("expire",), ("epoch",)]

    def happens(pool: Pool, event: tuple[str, ...]) -> None:
        match event:
            case ("reserve",):
                pool.reserve(1)
            case ("fill", run):
                pool.fill(run, "p")
            case ("filled", run):
                pool.filled(run)
            case ("release", run):
                pool.release(run)
            case ("dropped", run):
                pool.dropped("p", run)
            case ("clear",):
                pool.clear("p")
            case ("expire",):
                pool.now += LEASE_S
                pool.expire()
            case ("epoch",):
                pool.renew_epoch()

    def explore(pool: Pool, left: int) -> None:
        pool.check()
        key = f"{left}{fingerprint(pool)}"
        if not left or key in seen:
            return
        seen.add(key)
        for event in options(pool):
            after = copy.deepcopy(pool)
            happens(after, event)
            explore(after, left - 1)

    explore(Pool(table_of(2, "p")), 10)
    assert len(seen) > 500
