"""Recorded steps give what unrecorded ones give: padding, buckets, stale rows, and when not to record.

Here a recording is the function called again over the same memory; what CUDA adds to that is in
tests/gpu."""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.attention import AttentionParams
from baton.engine.batch import Batch, pack
from baton.engine.cuda import graphs
from baton.engine.cuda.fp8 import in_fp8, quantize_linears
from baton.engine.cuda.graphs import (
    CHEAP,
    Again,
    Buffers,
    GraphRunner,
    Replay,
    StaticAttention,
    static_groups,
)
from baton.engine.cuda.select import fastest, trial
from baton.engine.errors import NotRecorded, Unsupported
from baton.engine.gather import GatherAttention
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.kv.layout import KVLayout
from baton.kv.row import Logits, Row
from tests.torch.families import FAMILIES, VOCABULARY, make_model

CPU = torch.device("cpu")
BLOCK = 4
EACH = 8  # blocks of a sequence: room for 32 tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counting:
    """Notes how often it records, and how often each recording ran."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, forward: Replay) -> Replay:
        self.recorded += 1
        return Again().record(forward)


class Failing:
    """Records nothing, as a card on which capture fails."""

    def record(self, forward: Replay) -> Replay:
        forward()
        raise NotRecorded("operation not permitted when stream is capturing\nand more")


@cache
def plain(family: str) -> tuple[Runner, KVLayout]:
    model = make_model(family)
    return Runner(model), discover_layout(model, BLOCK, torch.float32)


def recorded(family: str) -> GraphRunner:
    return GraphRunner(plain(family)[0], StaticAttention(), Again)


def dirty(layout: KVLayout, blocks: int, device: torch.device) -> Pool:
    """What nobody wrote is not a number: reading it would show everywhere."""
    pool = Pool.private(layout, blocks, device, spare=True)
    for slab in pool.slabs[:-1]:
        slab.view(getattr(torch, layout.dtype)).fill_(float("nan"))
    return pool


class Play:
    """Sequences in a pool, and what they say step by step."""

    def __init__(self, runner: Runner | GraphRunner, layout: KVLayout, lengths: Sequence[int]):
        numbers = random.Random(5)
        self.runner = runner
        self.pool = dirty(layout, EACH * len(lengths), runner.device)
        free = numbers.sample(range(EACH * len(lengths)), EACH * len(lengths))
        self.tables = [[free.pop() for _ in range(EACH)] for _ in lengths]
        self.texts = [[numbers.randrange(VOCABULARY) for _ in range(n)] for n in lengths]
        for text, table in zip(self.texts, self.tables, strict=True):
            runner.fill(self.pool, [Row(text[:-1], 0, table)])

    def rows(self, present: Sequence[int]) -> list[Row]:
        texts, tables = self.texts, self.tables
        return [Row(texts[i][-1:], len(texts[i]) - 1, tables[i], Logits.LAST) for i in present]

    def step(self, present: Sequence[int]) -> torch.Tensor:
        logits = self.runner.run(self.pool, self.rows(present)).clone()
        for i, token in zip(present, logits.argmax(-1).tolist(), strict=True):
            self.texts[i].append(token)
        return logits


LENGTHS = (2, 9, 17, 3, 6)
STEPS = ((0, 1, 2), (0, 1, 2, 3, 4), (4,), (2, 0), (3, 1, 4), (1, 2, 3, 4, 0), (2,), (0, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_recorded(family: str) -> None:
    slow, layout = plain(family)
    fast = recorded(family)
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    for present in STEPS:
        torch.testing.assert_close(two.step(present), one.step(present), atol=1e-4, rtol=0)
    assert two.texts == one.texts
    assert fast.replayed == len(STEPS)
    assert not fast.failure


@pytest.mark.parametrize("keys", [1, 40])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_how_many_keys_are_gathered_at_a_time_makes_no_difference(
    family: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.cuda.graphs.GPU_KEYS", keys)
    one = Play(*plain(family), LENGTHS)
    two = Play(recorded(family), plain(family)[1], LENGTHS)
    for present in STEPS:
        torch.testing.assert_close(two.step(present), one.step(present), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_needs_no_look_at_what_it_computes(family: str) -> None:
    """No graph can hold a host that waits for the device: here there is nothing to wait for. Nor may
    a tensor be made on another device than the model's. Its products check what the card's check."""
    model: Any = make_model(family).to("meta", torch.bfloat16)
    assert quantize_linears(model, in_fp8)
    runner = GraphRunner(Runner(model), StaticAttention(), Again)
    assert trial(runner, replace(plain(family)[1], dtype="bfloat16")).device.type == "meta"
    assert runner.replayed == 4


def test_a_step_writes_its_own_places_and_the_spare_block_alone() -> None:
    play = Play(recorded("qwen2"), plain("qwen2")[1], LENGTHS)
    play.step((0, 1, 2, 3, 4))  # rows 3 and 4 of this bucket of 8 are stale in the next step
    before = [slab.clone() for slab in play.pool.slabs]
    rows = play.rows((2, 0))
    play.step((2, 0, 1))
    written = {row.blocks[row.start // BLOCK] for row in [*rows, *play.rows((1,))]}
    written |= {play.pool.spare}
    for layer, keys in enumerate(play.pool.keys):
        old = Pool.over(play.pool.layout, play.pool.blocks, before).keys[layer]
        same = (keys == old) | (keys.isnan() & old.isnan())
        changed = {block for block in range(play.pool.blocks) if not same[block].all()}
        assert changed <= written
    assert play.pool.spare not in {block for table in play.tables for block in table}


def test_a_bucket_is_recorded_once_when_it_is_first_needed() -> None:
    recorder = Counting()
    runner = GraphRunner(plain("gpt2")[0], StaticAttention(), lambda: recorder)
    play = Play(runner, plain("gpt2")[1], (2, 3, 4, 2))
    assert recorder.recorded == 0
    for present in ((0, 1, 2), (0, 1, 2, 3), (1, 2, 3), (0,), (1,), (0, 1, 2, 3)):
        play.step(present)
    assert recorder.recorded == 2  # rows 4 and 1
    assert runner.replayed == 6


def test_a_longer_sequence_takes_a_wider_bucket() -> None:
    recorder = Counting()
    runner = GraphRunner(plain("gpt2")[0], StaticAttention(), lambda: recorder)
    play = Play(runner, plain("gpt2")[1], (15, 2))
    for _ in range(4):  # 15, 16 tokens: 4 blocks; 17, 18: more
        play.step((0, 1))
    assert recorder.recorded == 2


def test_another_pool_gets_recordings_of_its_own() -> None:
    recorders: list[Counting] = []

    def make() -> Counting:
        recorders.append(Counting())
        return recorders[-1]

    slow, layout = plain("llama")
    runner = GraphRunner(slow, StaticAttention(), make)
    one, two = Play(runner, layout, LENGTHS), Play(runner, layout, LENGTHS)
    said = [one.step((0, 1)), two.step((0, 1)), one.step((0, 1)), two.step((0, 1))]
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[2], said[3])
    assert [each.recorded for each in recorders] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "case", ["a chunk", "no logits", "after_layer", "too many rows", "too many blocks", "no spare"]
)
def test_what_is_no_plain_step_runs_unrecorded(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, layout = plain("gpt2")
    runner = recorded("gpt2")
    play, other = Play(runner, layout, LENGTHS), Play(slow, layout, LENGTHS)
    rows, theirs = play.rows((0, 1, 2)), other.rows((0, 1, 2))
    called: list[int] = []
    after = called.append if case == "after_layer" else None
    match case:
        case "a chunk":
            long = Row([1, 2, 3], len(play.texts[3]) - 1, play.tables[3], Logits.LAST)
            rows.append(long)
            theirs.append(Row([1, 2, 3], long.start, other.tables[3], Logits.LAST))
        case "no logits":
            rows[0] = Row(rows[0].token_ids, rows[0].start, rows[0].blocks)
            theirs[0] = Row(theirs[0].token_ids, theirs[0].start, theirs[0].blocks)
        case "too many rows":
            monkeypatch.setattr(graphs, "MOST_ROWS", 2)
        case "too many blocks":
            monkeypatch.setattr(graphs, "MOST_BLOCKS", 4)
        case "no spare":
            play.pool = Pool.over(layout, play.pool.blocks, play.pool.slabs)
    found = runner.run(play.pool, rows, after)
    torch.testing.assert_close(found, slow.run(other.pool, theirs), atol=1e-5, rtol=0)
    assert runner.replayed == 0
    assert called == ([0, 1] if after else [])


def test_a_full_bucket_needs_no_spare_block() -> None:
    runner = recorded("gpt2")
    play = Play(runner, plain("gpt2")[1], LENGTHS)
    play.pool = Pool.over(play.pool.layout, play.pool.blocks, play.pool.slabs)
    play.step((0, 1))
    assert runner.replayed == 1


def test_one_long_sequence_among_many_short_ones_is_not_padded_for_all() -> None:
    attention = StaticAttention()
    assert attention.width([1] * 64) == 4
    assert attention.width([CHEAP // 64] * 64) == CHEAP // 64
    assert attention.width([CHEAP] * 2) == CHEAP
    assert attention.width([1] * 63 + [CHEAP]) is None


def test_where_recording_fails_steps_run_unrecorded_and_the_reason_is_kept() -> None:
    slow, layout = plain("gpt2")
    runner = GraphRunner(slow, StaticAttention(), Failing)
    one, two = Play(slow, layout, LENGTHS), Play(runner, layout, LENGTHS)
    for present in STEPS:
        torch.testing.assert_close(two.step(present), one.step(present))
    assert runner.failure == "operation not permitted when stream is capturing"
    assert runner.replayed == 0


def test_what_was_recorded_before_a_failure_goes_on() -> None:
    recorder: list[graphs.Recorder] = [Again()]

    class Once:
        def record(self, forward: Replay) -> Replay:
            return recorder.pop().record(forward) if recorder else Failing().record(forward)

    runner = GraphRunner(plain("gpt2")[0], StaticAttention(), Once)
    play = Play(runner, plain("gpt2")[1], LENGTHS)
    for present in ((0,), (0, 1, 2), (1,), (0,)):
        play.step(present)
    assert (runner.failure != "", runner.replayed) == (True, 3)


# ---- the choice at load


def test_the_first_way_that_gives_the_same_is_taken() -> None:
    slow, layout = plain("gemma2")
    chosen = fastest(slow, layout, [("torch", lambda: recorded("gemma2"))])
    assert isinstance(chosen, GraphRunner)
    assert chosen.backend == "in torch, CUDA graphs"
    assert chosen._pool is None  # the trial's pool and recordings are let go of


class Wrong(StaticAttention):
    """Attention without softcaps."""

    def kernel(self, batch: Batch, block_size: int) -> GatherAttention:
        class Plainer(GatherAttention):
            def __call__(
                self, query: torch.Tensor, pool: Pool, layer: int, params: AttentionParams
            ) -> torch.Tensor:
                return super().__call__(query, pool, layer, AttentionParams(params.scaling * 1.5))

        return Plainer(batch, block_size, static_groups)


def refuse() -> GraphRunner:
    raise Unsupported("layer 0 has attention sinks")


def test_ways_that_are_wrong_unfit_or_cannot_be_recorded_are_passed_over_and_told() -> None:
    slow, layout = plain("gemma2")
    slow = copy.copy(slow)
    ways = [
        ("sinkless", refuse),
        ("wrong", lambda: GraphRunner(slow, Wrong(), Again)),
        ("unlucky", lambda: GraphRunner(slow, StaticAttention(), Failing)),
    ]
    chosen = fastest(slow, layout, ways)
    assert chosen is slow
    assert "sinkless attention: layer 0 has attention sinks" in chosen.backend
    assert "wrong attention: its logits differ by" in chosen.backend
    assert "unlucky attention: operation not permitted" in chosen.backend
    fast = fastest(plain("gemma2")[0], layout, [*ways, ("torch", lambda: recorded("gemma2"))])
    assert fast.backend.startswith("in torch, CUDA graphs; not with graphs and sinkless")


@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_trial_takes_any_block_size(size: int) -> None:
    model = make_model("gpt2")
    layout = discover_layout(model, size, torch.float32)
    runner = GraphRunner(Runner(model), StaticAttention(), Again)
    torch.testing.assert_close(trial(runner, layout), trial(Runner(model), layout))
    assert runner.replayed == 4


# ---- buffers and groups


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, list[Row]]:
    """A block size and rows of one token, in blocks that no two of them share."""
    size = draw(st.integers(1, 5))
    free = draw(st.permutations(range(40)))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 11))
        count = -(-(start + 1) // size) + draw(st.integers(0, 1))
        blocks, free = free[:count], free[count:]
        if len(blocks) < count:
            break
        rows.append(Row([draw(st.integers(0, 99))], start, blocks, Logits.LAST))
    return size, rows or [Row([1], 0, [0], Logits.LAST)]


@given(st.lists(steps(), min_size=1, max_size=3))
def test_the_buffers_hold_this_step_and_nothing_of_an_earlier_one(
    played: list[tuple[int, list[Row]]],
) -> None:
    buffers = Buffers(8, 16, CPU)
    for size, rows in played:
        padded = [*rows, *[Row([0], 0, [63])] * (8 - len(rows))]
        buffers.load(padded, size)
        expected, found = pack(rows, size, CPU), buffers.batch
        count = len(rows)
        assert found.input_ids[0].tolist() == expected.input_ids[0].tolist() + [0] * (8 - count)
        assert found.position_ids[0, :count].tolist() == expected.position_ids[0].tolist()
        assert found.slots.tolist() == expected.slots.tolist() + [63 * size] * (8 - count)
        assert found.context_lengths[:count].tolist() == expected.context_lengths.tolist()
        width = expected.block_table.shape[1]
        assert found.block_table[:count, :width].tolist() == expected.block_table.tolist()
        assert not found.block_table[:, 1:][count:].any()
        assert not found.block_table[:count, width:].any()


@given(steps(), st.one_of(st.none(), st.integers(1, 6)), st.integers(1, 40))
def test_every_query_sees_its_own_past_and_reads_nothing_else(
    case: tuple[int, list[Row]], window: int | None, keys: int
) -> None:
    size, rows = case
    buffers = Buffers(len(rows), 12, CPU)
    buffers.load(rows, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baton.engine.cuda.graphs.GPU_KEYS", keys)
        groups = static_groups(buffers.batch, size, window)
    seen, read = {}, {}
    for group in groups:
        assert group.mask is not None
        for i, token in enumerate(group.tokens.tolist()):
            slots = group.slots.view(group.rows, -1)[i]
            found = slots[group.mask[i, 0, 0]].tolist()
            assert len(set(found)) == len(found)
            seen[token], read[token] = set(found), set(slots.tolist())
    for token, row in enumerate(rows):
        past = range(max(0, row.start - (window or 99) + 1), row.start + 1)
        expected = {row.blocks[p // size] * size + p % size for p in past}
        assert seen[token] == expected
        assert read[token] == expected
