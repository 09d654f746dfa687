"""Pool and batch: what lies where. Device: what is chosen, and what is said when it cannot be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import pack
from baton.engine.device import (
    describe_device,
    dtype_name,
    free_memory,
    pick_device,
    pick_dtype,
)
from baton.engine.gather import plan_groups
from baton.engine.pool import Pool, pool_blocks
from baton.errors import InputError, OutOfMemory
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Logits, Row

CPU = torch.device("cpu")
LAYOUT = KVLayout((LayerShape(2, 6, 4), LayerShape(1, 8, 8)), 4, "float32")


@st.composite
def rows_over_a_pool(draw: st.DrawFn) -> tuple[int, list[Row]]:
    """A block size and rows of unlike sequences, in blocks no two of them share."""
    size = draw(st.integers(1, 5))
    free = draw(st.permutations(range(40)))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        start, length = draw(st.integers(0, 12)), draw(st.integers(1, 9))
        count = -(-(start + length) // size) + draw(st.integers(0, 1))
        blocks, free = free[:count], free[count:]
        if len(blocks) < count:
            break
        tokens = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
        rows.append(Row(tokens, start, blocks, draw(st.sampled_from(Logits))))
    return size, rows or [Row([1], 0, [0])]


@settings(max_examples=60, deadline=None)
@given(rows_over_a_pool())
def test_a_batch_says_of_every_token_where_it_belongs(case: tuple[int, list[Row]]) -> None:
    size, rows = case
    batch = pack(rows, size, CPU)
    where = [(row, p) for row in rows for p in range(row.start, row.end)]
    assert batch.input_ids.tolist() == [[each for row in rows for each in row.token_ids]]
    assert batch.position_ids.tolist() == [[p for _, p in where]]
    assert batch.slots.tolist() == [row.blocks[p // size] * size + p % size for row, p in where]
    assert len(set(batch.slots.tolist())) == len(where)  # no token overwrites another
    assert batch.query_offsets.diff().tolist() == [len(row.token_ids) for row in rows]
    assert batch.context_lengths.tolist() == [row.end for row in rows]
    wanted = [
        (row.logits is Logits.ALL) or (row.logits is Logits.LAST and p == row.end - 1)
        for row, p in where
    ]
    assert batch.logit_rows.tolist() == [i for i, wants in enumerate(wanted) if wants]


@settings(max_examples=60, deadline=None)
@given(rows_over_a_pool(), st.one_of(st.none(), st.integers(1, 6)))
def test_every_query_sees_its_own_past_and_nothing_else(
    case: tuple[int, list[Row]], window: int | None
) -> None:
    size, rows = case
    batch = pack(rows, size, CPU)
    seen: dict[int, set[int]] = {}  # packed token -> slots it attends to
    for group in plan_groups(batch, size, window):
        tokens, slots = group.tokens.view(group.rows, -1), group.slots.view(group.rows, -1)
        shape = (group.rows, 1, tokens.shape[1], slots.shape[1])
        mask = torch.ones(shape, dtype=torch.bool) if group.mask is None else group.mask
        mask = mask.tril() if group.causal else mask.expand(shape)
        for row in range(group.rows):
            for i, token in enumerate(tokens[row].tolist()):
                found = slots[row][mask[row, 0, i]].tolist()
                assert len(set(found)) == len(found)
                seen[token] = set(found)
    expected = [
        {
            row.blocks[q // size] * size + q % size
            for q in range(max(0, p - (window or 99) + 1), p + 1)
        }
        for row in rows
        for p in range(row.start, row.end)
    ]
    assert [seen[token] for token in range(len(expected))] == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.data())
def test_what_is_written_to_a_slot_lies_in_its_block_of_the_slab(
    blocks: int, data: st.DataObject
) -> None:
    pool = Pool.private(LAYOUT, blocks, CPU)
    for slab in pool.slabs:
        slab.zero_()
    slot = data.draw(st.integers(0, blocks * 4 - 1))
    pool.write(0, torch.tensor([slot]), torch.full((1, 2, 6), 1.0), torch.full((1, 2, 4), 2.0))
    slab = pool.slabs[0].view(torch.float32)
    values = 2 * 6 * 4 * blocks  # floats of all key blocks, before the value blocks
    assert slab.nonzero().flatten().tolist() == [
        *range(slot * 12, slot * 12 + 12),
        *range(values + slot * 8, values + slot * 8 + 8),
    ]
    assert pool.keys[0][slot // 4, slot % 4].eq(1).all()
    assert pool.values[0][slot // 4, slot % 4].eq(2).all()
    assert not pool.slabs[1].any()


def test_two_pools_over_the_same_slabs_are_one_memory() -> None:
    mine = Pool.private(LAYOUT, 3, CPU)
    theirs = Pool.over(LAYOUT, 3, mine.slabs)
    mine.stamps[1] = 77
    mine.write(1, torch.tensor([5]), torch.ones(1, 1, 8), torch.ones(1, 1, 8))
    assert theirs.stamps.tolist() == [0, 77, 0]
    assert theirs.keys[1][1, 1].eq(1).all()
    assert (theirs.blocks, theirs.device) == (3, CPU)


def test_every_layer_has_a_storage_of_its_own() -> None:
    pool = Pool.private(LAYOUT, 3, CPU)
    assert len({slab.untyped_storage().data_ptr() for slab in pool.slabs}) == 3


def test_a_pool_is_as_large_as_wanted_or_as_memory_allows() -> None:
    per_block = sum(LAYOUT.slab_bytes(1))
    assert pool_blocks(LAYOUT, CPU, None, 41) == 11
    assert pool_blocks(LAYOUT, CPU, 5 * per_block + 1, 41) == 5


def test_a_pool_too_small_to_be_of_use_says_needed_and_free() -> None:
    with pytest.raises(OutOfMemory, match=r"needs \d+ MiB on cpu, but \d+ MiB are available"):
        pool_blocks(LAYOUT, CPU, 2**20, 2**40, tokens_needed=2**30)


def test_a_pool_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(OutOfMemory, match="MiB on cpu"):
        pool_blocks(LAYOUT, CPU, 2**60, 2**60)


def test_devices_are_picked_by_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cuda", "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:1", "meta", "xpu"])
def test_a_device_that_is_not_there_is_answered_with_those_that_are(name: str) -> None:
    with pytest.raises(InputError, match=r"use auto or one of cpu") as caught:
        pick_device(name)
    assert repr(name) in str(caught.value)


def test_dtypes_are_picked_by_name() -> None:
    assert pick_dtype("auto", CPU) is torch.float32
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    assert dtype_name(torch.bfloat16) == "bfloat16"
    with pytest.raises(InputError, match="'int8'"):
        pick_dtype("int8", CPU)


def test_the_cpu_can_be_described() -> None:
    assert "threads" in describe_device(CPU)
    assert free_memory(CPU) > 0
