"""Workers of one rank and of two, on either side of a hand-over: real ranks, in two processes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from baton.engine.boot import Engine
from baton.engine.pool import Pool
from baton.errors import InputError, TransferError
from baton.kv.region import Region
from baton.kv.row import Logits, Row
from baton.parallel.start import Division, start
from tests.cluster.real_town import RealTown
from tests.cluster.reference import Model, load
from tests.torch.families import save_checkpoint

BLOCK, LENGTH = 8, 12
LENGTHS = (5, 21, 40)


@dataclass(frozen=True)
class Sides:
    """One model on one rank, and on two."""

    one: Model
    two: Engine
    staged: bool

    def engine(self, ranks: int) -> Engine:
        return self.one.engine if ranks == 1 else self.two

    @property
    def transports(self) -> list[str]:
        return ["frames"] if self.staged else ["shm", "frames"]


class Divided(RealTown):
    """Its prefill and its decode workers have engines of their own."""

    def __init__(self, sides: Sides, *, prefill: int, decode: int, transport: str) -> None:
        self.of_role = {"prefill": sides.engine(prefill), "decode": sides.engine(decode)}
        super().__init__(sides.one, transport=transport, chunk=16, prefills=int(prefill > 0))

    def start_worker(self, role: str, index: int) -> str:
        self.model = replace(self.model, engine=self.of_role[role])
        return super().start_worker(role, index)


@pytest.fixture(scope="module", params=["the bundled model, shared", "qwen2, staged"])
def sides(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sides]:
    staged = "staged" in request.param
    folder = tmp_path_factory.mktemp("model")
    name = str(save_checkpoint("qwen2", folder)) if staged else "demo"
    one = load(name, block_size=BLOCK)
    ended: list[tuple[int, int]] = []
    division = Division(2, 1, staged, ended=lambda rank, code: ended.append((rank, code)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    two = start(one.files, division, name="w", device="cpu", dtype="float32", block_size=BLOCK)
    yield Sides(one, two.engine, staged)
    two.close()
    torch.set_num_threads(threads)
    assert ended == []


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 2), (0, 2)])
def test_any_numbers_of_ranks_hand_over_to_each_other(
    sides: Sides, prefill: int, decode: int
) -> None:
    """Greedy tokens are transformers' own. 0: decode fills its own blocks. The second time prompts are
    found in the prefix cache."""
    prompts = sides.one.clear_prompts(LENGTHS, LENGTH)
    right = [sides.one.generate(prompt, LENGTH).tokens for prompt in prompts]
    for transport in sides.transports[: 2 if prefill else 1]:
        with Divided(sides, prefill=max(prefill, 1), decode=decode, transport=transport) as town:
            if not prefill:
                (name,) = town.fillings
                town.kill(name, restart=False)
            assert town.ask(prompts, LENGTH) == right
            assert {way.filled_by != "" for way in town.ways.values()} == {prefill > 0}


def test_a_pool_has_all_heads_whatever_the_number_of_ranks(sides: Sides) -> None:
    """What a hand-over pushes: the slabs after a forward, layer by layer."""
    pools, seen = [], list[tuple[int, int]]()
    ids = [7 * i % 300 + 1 for i in range(19)]
    for ranks in (1, 2):
        engine = sides.engine(ranks)
        pool = engine.pools.own(4)
        for slab in pool.slabs[:-1]:
            slab.zero_()
        layers: list[int] = []
        engine.runner.fill(pool, [Row(ids, 0, [3, 1, 2])], layers.append)
        assert layers == list(range(len(engine.layout.layers)))
        pools.append(pool)
        seen.append((engine.layout.block_bytes, len(pool.slabs)))
    one, two = pools
    assert seen[0] == seen[1]
    for ours, theirs in zip((*two.keys, *two.values), (*one.keys, *one.values), strict=True):
        written = [each[[3, 1, 2]].flatten(0, 1)[: len(ids)] for each in (ours, theirs)]
        torch.testing.assert_close(*written, atol=1e-5, rtol=1e-4)
    sides.two.pools.drop(two)


def test_hidden_states_are_those_of_one_rank(sides: Sides) -> None:
    ids = [11 * i % 300 + 1 for i in range(9)]
    found = []
    for ranks in (1, 2):
        engine = sides.engine(ranks)
        pool = engine.pools.own(2)
        found.append(engine.runner.hidden(pool, [Row(ids, 0, [1, 0])]).clone())
        engine.pools.drop(pool)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_an_error_of_a_push_waits_for_the_end_of_the_forward(sides: Sides) -> None:
    """The other rank is in the middle of it; afterwards both go on."""
    engine, row = sides.two, Row([5, 6, 7], 0, [0], Logits.LAST)
    pool = engine.pools.own(1)

    def fails(layer: int) -> None:
        raise TransferError("the way is lost")

    with pytest.raises(TransferError, match="the way is lost"):
        engine.runner.fill(pool, [row], fails)
    (again,) = engine.runner.greedy(pool, [row])
    engine.pools.drop(pool)
    (right,) = sides.one.engine.runner.greedy(Pool.private(engine.layout, 1, engine.device), [row])
    assert again == right


def test_a_pool_whose_owner_is_gone_is_refused_and_both_ranks_go_on(sides: Sides) -> None:
    engine = sides.two
    pool = Pool.private(engine.layout, 1, engine.device)
    gone = Region("shm", engine.layout.fingerprint, 1, {
        "host": "nowhere", "path": "/proc/1/fd/0", "size": 1, "token": b"", "epoch": "",
    })  # fmt: skip
    with pytest.raises(TransferError, match="another rank of this worker cannot map the pool"):
        engine.pools.over(pool.slabs, 1, lambda: gone)
    mine = engine.pools.own(1)
    assert engine.runner.greedy(mine, [Row([5], 0, [0], Logits.LAST)])[0] is not None
    engine.pools.drop(mine)


def test_how_many_blocks_a_pool_has(sides: Sides, tmp_path: Path) -> None:
    """The bytes are those of all ranks, so the same as of one."""
    layout = sides.two.layout
    for ranks in (1, 2):
        blocks = sides.engine(ranks).pools.blocks(5 * sum(layout.slab_bytes(1)), 2**20, None)
        assert 4 <= blocks <= 5  # the stamps, which staged ranks have each


def test_staged_pools_take_no_transport_that_computes_in_them(sides: Sides) -> None:
    pools = sides.two.pools
    assert pools.transports("auto") == ("frames" if sides.staged else "auto")
    assert pools.transports("frames") == "frames"
    if sides.staged:
        with pytest.raises(InputError, match="does not go with several ranks on GPUs"):
            pools.transports("shm")
    else:
        assert pools.transports("shm") == "shm"


def test_what_computes_is_said(sides: Sides) -> None:
    assert sides.two.runner.backend.startswith("in torch, 2 ranks")
    assert "neither compiled nor recorded" in sides.two.runner.backend
