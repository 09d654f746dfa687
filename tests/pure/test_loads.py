"""What the router counts as it changes, against the slow definitions; and what follows from it.

tests/pure/slow_loads.py compares whole routers, in test_cluster_random.py after every turn and in
test_explore.py in every state."""

from hashlib import sha256
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.prefix import HASH_BYTES
from baton.lifecycle import State
from baton.wire import messages as msg
from baton.wire.codec import encode
from baton.wire.node import To
from router.affinity import Affinity
from router.candidates import decode_choices
from router.loads import Loads
from router.observers import LOOK_S, UPDATE_S, Watchers
from router.placement import DecodeChoice, choose_decode
from router.workers import DECODE, Member
from tests.pure.desk import Desk, sent
from tests.pure.slow_loads import wrong_choices, wrong_counts
from tests.pure.test_workers import hello
from tests.pure.town import Town

WORKERS = ("a", "b", "c", "d")
POOL = 12


@given(
    st.lists(st.tuples(st.sampled_from(WORKERS), st.integers(0, 5), st.booleans()), max_size=12),
    st.dictionaries(st.sampled_from(WORKERS), st.floats(0.01, 1.0), max_size=3),
    st.sets(st.sampled_from(WORKERS)),
    st.integers(0, POOL),
)
def test_the_policy_chooses_among_few_what_it_chooses_among_all(
    placed: list[tuple[str, int, bool]],
    cached: dict[str, float],
    unable: set[str],
    blocks: int,
) -> None:
    loads, here = Loads(), {worker: dict[str, int]() for worker in WORKERS}
    for worker in WORKERS:
        loads.joined(worker, POOL)
    for number, (worker, held, stays) in enumerate(placed):
        loads.placed(f"r{number}", worker, held)
        here[worker][f"r{number}"] = held + 1
        if not stays:
            loads.removed(f"r{number}", worker, decoding=False)
            del here[worker][f"r{number}"]
    members = {w: Member(hello(w, role=DECODE), 0.0) for w in WORKERS if w not in unable}
    everybody = [
        DecodeChoice(w, POOL - sum(here[w].values()), len(here[w]), cached.get(w, 0.0))
        for w in members
    ]
    few = decode_choices(loads, members.get, blocks=blocks, cached=cached)
    assert choose_decode(few, blocks) == choose_decode(everybody, blocks)
    assert set(few) <= set(everybody)
    assert len(few) <= 1 + len(cached)


def test_who_computes_is_busy_and_nothing_is_remembered_of_who_is_gone() -> None:
    loads = Loads()
    loads.joined("d", 9)
    loads.joined("p", None)
    loads.placed("r", "d", 2)
    loads.filling("r", "p", 30)
    assert (list(loads.decodes), list(loads.prefills)) == ([(1, -6, "d")], [(30, 0, "p")])
    assert loads.busy == {"p"}
    loads.filled("r", "p")
    loads.decoding("d")
    assert loads.busy == {"d"}
    loads.left("d")
    assert loads.on_worker("d") == ("r",)
    assert list(loads.decodes) == []
    loads.removed("r", "d", decoding=True)
    assert (loads.busy, loads.on_worker("d"), set(loads._loads)) == (frozenset(), (), {"p"})


def test_a_block_names_its_worker_as_every_worker_is_asked() -> None:
    affinity = Affinity(slots=8)
    hashes = [sha256(bytes([i])).digest()[:HASH_BYTES] for i in range(12)]
    for number, worker in product(range(4), WORKERS):
        affinity.sent(hashes[number * 3 % 7 : number + 5], worker)
    for worker in WORKERS:
        affinity.joined(worker)
    affinity.left("b")
    for begin in range(len(hashes)):
        asked = hashes[begin:]
        each = {w: affinity.there(asked, w) / len(asked) for w in WORKERS if w != "b"}
        assert affinity.shares(asked) == {w: share for w, share in each.items() if share}
    assert affinity.shares([]) == {}


def test_a_request_that_grows_takes_its_blocks_from_the_count_of_free_ones() -> None:
    town = Town(prefills=1, decodes=2, blocks=64)
    for index in range(5):
        town.submit(f"r{index}", range(1, 7 + index), 30)
    seen = 0

    def ends() -> bool:
        nonlocal seen
        assert not [*wrong_counts(town.router), *wrong_choices(town.router, town.now)]
        seen += town.router.ledger.count(State.DECODING)
        return all(town.outcomes[f"r{index}"].ends for index in range(5))

    town.run(ends)
    assert seen


# ---- watching


def test_watching_clients_cost_nothing_while_nothing_changes() -> None:
    desk = Desk()
    for index in range(50):
        desk.hear(f"client-{index}", msg.GetClusterInfo())
    assert len(sent(desk.step(), msg.ClusterInfo)) == 50
    looked: list[float] = []
    info = desk.router.info
    desk.router.info = lambda now: looked.append(now) or info(now)  # type: ignore[method-assign]
    desk.submit("a")
    for _ in range(20):
        assert sent(desk.step(), msg.ClusterInfo) == []
    assert looked == []


class Told:
    """Watchers of an info that a test changes."""

    def __init__(self) -> None:
        self.watchers, self.info, self.looks = Watchers(), Desk().router.info(0.0), 0

    def at(self, now: float, *, news: bool = False) -> list[str]:
        """Who is told."""
        effects = self.watchers.updates(self._look, now, news=news)
        assert all(isinstance(e, To) and e.message is self.info for e in effects)
        return [e.peer for e in effects if isinstance(e, To)]

    def _look(self) -> msg.ClusterInfo:
        self.looks += 1
        return self.info

    def changes(self) -> None:
        self.info = (
            Desk()
            .router.info(0.0)
            .__class__(
                **{n: getattr(self.info, n) for n in self.info.__slots__}
                | {"context": self.looks + 9}
            )
        )


def test_news_are_told_at_once_and_further_ones_together() -> None:
    told = Told()
    for client in "ab":
        told.watchers.add(client)
    assert told.at(0.0) == ["a", "b"]
    told.changes()
    assert told.at(0.01, news=True) == ["a", "b"]
    told.changes()
    assert told.at(0.02, news=True) == []
    assert told.watchers.due(0.02) == pytest.approx(0.01 + UPDATE_S - 0.02)
    assert told.at(0.01 + UPDATE_S) == ["a", "b"]
    assert told.looks == 3
    assert told.watchers.due(0.2) == float("inf")


def test_news_that_change_nothing_are_told_to_nobody() -> None:
    told = Told()
    told.watchers.add("a")
    told.at(0.0)
    assert told.at(5.0, news=True) == []


def test_who_asks_again_is_told_and_the_others_only_what_they_do_not_know() -> None:
    told = Told()
    for client in "ab":
        told.watchers.add(client)
    told.at(0.0)
    told.watchers.add("b")
    assert told.at(0.01) == ["b"]
    told.changes()
    told.watchers.add("b")
    assert told.at(0.02) == ["a", "b"]
    told.watchers.remove("a")
    told.changes()
    assert told.at(0.5, news=True) == ["b"]


def test_what_changes_by_time_alone_is_looked_for_once_a_second() -> None:
    told = Told()
    told.watchers.add("a")
    told.at(0.0)
    told.changes()
    assert told.at(LOOK_S - 0.01) == []
    assert told.at(LOOK_S) == ["a"]


def test_a_worker_that_falls_silent_is_shown_so_within_a_second() -> None:
    town = Town(prefills=1, decodes=1, patience_s=60.0)
    town.client(msg.GetClusterInfo())
    town.run(lambda: bool(town.infos) and town.infos[-1].ready)
    (decode,) = town.workers("decode")
    town.stalled.add(decode)
    began = town.now
    town.run(lambda: "suspect" in {worker.state for worker in town.infos[-1].workers})
    assert town.now - began < 5.0
    assert encode(town.infos[-1])
