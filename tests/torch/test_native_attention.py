"""Attention in C++ gives what plain torch gives, and to the bit the same in whatever company."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.cpu.build import NoCompiler
from baton.engine.cpu.kernel import NativeAttention, describe_batch, describe_layer, library
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.runner import Runner
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row
from tests.torch.families import FAMILIES
from tests.torch.test_engine_parity import case as family_case
from tests.torch.test_engine_parity import run_in_chunks

CPU = torch.device("cpu")
MANY = 10**6

try:
    library()
except NoCompiler as why:
    pytest.skip(f"no native code here: {why}", allow_module_level=True)


@dataclass(frozen=True)
class Case:
    """Sequences of `stretches[i] = (start, tokens)`: tokens to run after `start` that are there."""

    seed: int
    stretches: tuple[tuple[int, int], ...]
    block_size: int
    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int | None
    softcap: float | None
    sinks: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


CASES = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    stretches=st.lists(
        st.tuples(
            st.one_of(st.just(0), st.integers(0, 200)), st.one_of(st.just(1), st.integers(1, 150))
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
    block_size=st.integers(1, 32),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 8, 13]),
    key_dim=st.sampled_from([1, 16, 24, 40, 64, 80]),
    value_dim=st.sampled_from([12, 16, 33, 64, 96]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    window=st.one_of(st.none(), st.integers(1, 130)),
    softcap=st.one_of(st.none(), st.sampled_from([0.5, 30.0])),
    sinks=st.booleans(),
)


class Scene:
    """A pool whose every byte that nobody wrote is not a number, and queries to it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        numbers = torch.Generator().manual_seed(case.seed)
        needed = [-(-(start + tokens) // case.block_size) for start, tokens in case.stretches]
        shape = LayerShape(case.kv_heads, case.key_dim, case.value_dim)
        self.pool = Pool.private(KVLayout((shape,), case.block_size, case.dtype), sum(needed), CPU)
        order = torch.randperm(sum(needed), generator=numbers).tolist()
        self.rows, self.queries = [], []
        for part in (*self.pool.keys, *self.pool.values):
            part.fill_(math.nan)
        for (start, tokens), blocks in zip(case.stretches, needed, strict=True):
            table, order = order[:blocks], order[blocks:]
            self.rows.append(Row([0] * tokens, start, table))
            end = start + tokens
            slots = torch.tensor(
                [table[p // case.block_size] * case.block_size + p % case.block_size
                 for p in range(end)]
            )  # fmt: skip
            keys = torch.randn(end, case.kv_heads, case.key_dim, generator=numbers)
            values = torch.randn(end, case.kv_heads, case.value_dim, generator=numbers)
            self.pool.write(0, slots, keys, values)
            self.queries.append(torch.randn(tokens, case.heads, case.key_dim, generator=numbers))
        sinks = torch.randn(case.heads, generator=numbers) if case.sinks else None
        self.params = AttentionParams(case.key_dim**-0.5, case.window, case.softcap, sinks)

    def native(
        self, rows: Sequence[Row], queries: Sequence[torch.Tensor], threads: int = 2
    ) -> torch.Tensor:
        kernel = NativeAttention(
            pack(rows, self.case.block_size, CPU), self.case.block_size, threads
        )
        return kernel(torch.cat(list(queries)), self.pool, 0, self.params)

    def chunked(self, row: int, size: int) -> torch.Tensor:
        """One sequence alone, `size` tokens at a time."""
        whole, queries = self.rows[row], self.queries[row]
        parts = [
            self.native(
                [Row(whole.token_ids[at : at + size], whole.start + at, whole.blocks)],
                [queries[at : at + size]],
            )
            for at in range(0, len(queries), size)
        ]
        return torch.cat(parts)

    def gathered(self) -> torch.Tensor:
        """What torch makes of it, in fp32: bf16 keys and values are exact in that."""
        whole = replace(
            self.pool,
            keys=tuple(each.float() for each in self.pool.keys),
            values=tuple(each.float() for each in self.pool.values),
        )
        kernel = GatherAttention(pack(self.rows, self.case.block_size, CPU), self.case.block_size)
        return kernel(torch.cat(self.queries), whole, 0, self.params)


@settings(deadline=None, max_examples=60)
@given(CASES, st.integers(1, 5))
def test_it_is_what_torch_computes(case: Case, threads: int) -> None:
    scene = Scene(case)
    ours = scene.native(scene.rows, scene.queries, threads)
    torch.testing.assert_close(ours, scene.gathered(), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(CASES, st.integers(2, 70), st.integers(2, 5))
def test_company_chunks_and_threads_do_not_change_a_bit(
    case: Case, chunk: int, threads: int
) -> None:
    scene = Scene(case)
    together = scene.native(scene.rows, scene.queries, 1)
    assert torch.equal(scene.native(scene.rows, scene.queries, threads), together)
    turned = scene.native(scene.rows[::-1], scene.queries[::-1], threads)
    parts = together.split([len(each) for each in scene.queries])
    assert torch.equal(turned, torch.cat(parts[::-1]))
    for row, part in enumerate(parts):
        for size in (MANY, chunk, 1):
            assert torch.equal(scene.chunked(row, size), part)


def plain(**others: object) -> Case:
    settings: dict[str, object] = dict(
        seed=1, stretches=((100, 90), (0, 70), (130, 1)), block_size=16, kv_heads=2, group=2,
        key_dim=64, value_dim=64, dtype="float32", window=None, softcap=None, sinks=False,
    )  # fmt: skip
    return Case(**settings | others)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("others", [{}, {"window": 30}, {"group": 8}, {"key_dim": 20}], ids=str)
def test_a_number_that_is_none_stays_in_its_sequence(bad: float, others: dict[str, object]) -> None:
    scene = Scene(plain(**others))
    before = scene.native(scene.rows, scene.queries).split([90, 70, 1])
    slot = scene.rows[0].blocks[150 // 16], 150 % 16  # of position 150, the 51st to run
    scene.pool.keys[0][slot] = bad
    scene.pool.values[0][slot] = bad
    after = scene.native(scene.rows, scene.queries).split([90, 70, 1])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[0][:50], before[0][:50]), "it was not there yet"
    assert after[0][50:80].isnan().flatten(1).any(dim=1).all()
    chunks = scene.chunked(0, 7)
    assert torch.equal(chunks.nan_to_num(7.0), after[0].nan_to_num(7.0))
    assert torch.equal(chunks.isnan(), after[0].isnan())


def test_scores_without_bound_are_weighed_as_in_torch() -> None:
    scene = Scene(plain(stretches=((0, 140),), group=1, kv_heads=1))
    scene.queries[0].fill_(1e30)
    keys, blocks = scene.pool.keys[0], scene.rows[0].blocks
    keys.fill_(-1e20)  # their scores overflow, and weigh nothing
    keys[blocks[0], 0] = 0
    keys[blocks[70 // 16], 70 % 16] = 1e-30
    keys[blocks[120 // 16], 120 % 16] = 1e20  # from here on it is infinity against infinity
    ours = scene.native(scene.rows, scene.queries)
    torch.testing.assert_close(ours, scene.gathered(), atol=1e-5, rtol=1e-5, equal_nan=True)
    assert ours[:120].isfinite().all()
    assert ours[120:].isnan().all()


def test_many_heads_on_one_key() -> None:
    scene = Scene(plain(kv_heads=1, group=100, stretches=((70, 3), (5, 1))))
    ours = scene.native(scene.rows, scene.queries, 3)
    torch.testing.assert_close(ours, scene.gathered(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_keys_and_values_are_written_as_torch_writes_them(dtype: str, threads: int) -> None:
    scene = Scene(plain(dtype=dtype, key_dim=20))
    batch = pack(scene.rows, 16, CPU)
    tokens = len(batch.slots)
    keys, values = torch.randn(tokens, 2, 20), torch.randn(tokens, 2, 64)
    keys[3, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 1 + 2**-8])
    values[-1, 1, 63] = math.nan
    expected = Pool.private(scene.pool.layout, scene.pool.blocks, CPU)
    for copy, part in zip((*expected.keys, *expected.values), (*scene.pool.keys, *scene.pool.values),
                          strict=True):  # fmt: skip
        copy.copy_(part)
    expected.write(0, batch.slots, keys, values)
    layer = describe_layer(scene.pool, 0, 4, scene.params, None)
    packed = describe_batch(batch, 16)
    library().baton_write_kv(
        ctypes.addressof(layer), ctypes.addressof(packed),
        keys.data_ptr(), 40, values.data_ptr(), 128, threads,
    )  # fmt: skip
    for ours, theirs in (
        (scene.pool.keys[0], expected.keys[0]), (scene.pool.values[0], expected.values[0])
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("chunks", "late"),
    [((1, 1, 1), (0, 0, 0)), ((99, 99, 99), (0, 0, 0)), ((1, 99, 7), (0, 5, 3))],
    ids=["one token at a time", "whole", "prefill joins decode"],
)
def test_every_family_gives_its_own_logits(
    family: str, chunks: Sequence[int], late: Sequence[int]
) -> None:
    it = family_case(family)
    native = replace(it, runner=Runner(it.model, NativeAttention))
    for ours, theirs in zip(run_in_chunks(native, chunks, late), it.expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_pool_in_fp16_is_read_by_torch() -> None:
    scene = Scene(plain(dtype="float16"))
    ours = scene.native(scene.rows, [each.half() for each in scene.queries])
    torch.testing.assert_close(ours.float(), scene.gathered(), atol=5e-3, rtol=5e-3)
