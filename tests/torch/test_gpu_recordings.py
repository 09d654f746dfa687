"""What a reading of the GPU's path found, as far as it shows without a card: recorded steps, and captures
that fail."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.engine.boot import Recording
from baton.engine.cuda.graphs import (
    Again,
    CudaGraphs,
    GraphRunner,
    Replay,
    StaticAttention,
    ladder,
)
from baton.engine.errors import NotRecorded
from decode_worker.speculation import PromptLookup, Speculation, Wanted
from tests.torch.test_gpu_findings import CUDA
from tests.torch.test_graphs import LENGTHS, Counting, Play, plain

# ---- 4, 10: recordings


def test_a_ladder_is_recorded_before_serving_and_nothing_while_serving() -> None:
    recorder = Counting()
    slow, layout = plain("qwen2")
    runner = GraphRunner(slow, StaticAttention(), lambda: recorder)
    play = Play(runner, layout, LENGTHS)
    assert isinstance(runner, Recording)
    runner.prepare(play.pool, 6, 32)
    at_load = recorder.recorded
    assert at_load == len(ladder(StaticAttention(), 6, 8, play.pool.blocks))
    other = Play(slow, layout, LENGTHS)
    replayed = 0
    for present in ((0, 1, 2), (0, 1, 2, 3, 4), (4,), (2, 0), (1, 3)) * 3:
        torch.testing.assert_close(play.step(present), other.step(present), atol=1e-4, rtol=0)
        replayed += 1
        assert runner.replayed == replayed
    assert recorder.recorded == at_load
    beside = Play(runner, layout, LENGTHS)  # another pool
    torch.testing.assert_close(
        beside.step((0, 1)), Play(slow, layout, LENGTHS).step((0, 1)), atol=1e-4, rtol=0
    )
    assert (recorder.recorded, runner.replayed) == (at_load, replayed)
    play.step((0, 1))
    assert runner.replayed == replayed + 1


def test_more_rows_or_blocks_than_the_ladder_has_run_unrecorded() -> None:
    recorder = Counting()
    slow, layout = plain("gpt2")
    runner = GraphRunner(slow, StaticAttention(), lambda: recorder)
    play, other = Play(runner, layout, LENGTHS), Play(slow, layout, LENGTHS)
    runner.prepare(play.pool, 2, 12)
    at_load = recorder.recorded
    for present in ((0, 1, 2), (2,)):  # three rows; a sequence of 17 tokens
        torch.testing.assert_close(play.step(present), other.step(present), atol=1e-5, rtol=0)
    assert (recorder.recorded, runner.replayed) == (at_load, 0)


def test_the_ladder_is_short_and_its_largest_bucket_comes_first() -> None:
    class Paged(StaticAttention):
        def width(self, blocks: Any) -> int:
            return 0

    assert ladder(Paged(), 64, 2048, 10**6) == [(1 << bit, 0) for bit in reversed(range(7))]
    assert ladder(Paged(), 1, 1, 10) == [(1, 0)]
    assert ladder(Paged(), 1000, 9, 10)[0] == (256, 0)
    gathered = ladder(StaticAttention(), 64, 2048, 10**6)
    assert gathered[0] == (64, 2048)
    assert len(gathered) <= 45
    assert all(rows * width <= 4096 for rows, width in ladder(StaticAttention(), 256, 2048, 100))


def test_a_step_that_cannot_be_recorded_at_load_ends_the_ladder() -> None:
    class Failing:
        tried = 0

        def record(self, forward: Replay) -> Replay:
            Failing.tried += 1
            raise NotRecorded("no")

    slow, layout = plain("gpt2")
    runner = GraphRunner(slow, StaticAttention(), Failing)
    play, other = Play(runner, layout, LENGTHS), Play(slow, layout, LENGTHS)
    runner.prepare(play.pool, 4, 32)
    torch.testing.assert_close(play.step((0, 1)), other.step((0, 1)))
    assert Failing.tried == 1


def test_with_many_runs_nothing_is_drafted_where_steps_are_recorded() -> None:
    wanted = [Wanted(f"r{i}", [1, 2, 3, 1, 2, 3, 1, 2], 3) for i in range(3)]
    assert len(Speculation(PromptLookup(), 3).draft(wanted, 99)) == 3
    assert len(Speculation(PromptLookup(), 3, rows=3).draft(wanted, 99)) == 3
    assert Speculation(PromptLookup(), 3, rows=2).draft(wanted, 99) == {}
    assert GraphRunner(plain("gpt2")[0], StaticAttention(), Again).draft_rows == 4


# ---- 7: a capture that fails


class Card:
    """torch.cuda as far as a capture needs it: the current stream, and the pools that are open."""

    def __init__(self, patch: pytest.MonkeyPatch, *, fails: str) -> None:
        self.usual = self.current = SimpleNamespace(name="usual", device=CUDA,
                                                    wait_stream=lambda other: None)  # fmt: skip
        self.own = SimpleNamespace(name="own", device=CUDA, wait_stream=lambda other: None)
        self.open: list[Any] = []
        card = self

        class Stream:
            def __init__(self, stream: Any) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                self.before, card.current = card.current, self.stream

            def __exit__(self, *error: object) -> None:
                card.current = self.before

        class Graph(Stream):
            """As torch's: what comes after the end of a capture does not happen if that fails."""

            def __init__(self, graph: Any, *, pool: Any, stream: Any, **_: Any) -> None:
                super().__init__(stream)
                self.pool = pool

            def __enter__(self) -> None:
                super().__enter__()
                if fails == "begin":
                    raise RuntimeError("cannot begin")
                card.open.append(self.pool)

            def __exit__(self, *error: object) -> None:
                if fails in ("end", "forward"):
                    raise RuntimeError("operation failed due to a previous error during capture")
                card.open.remove(self.pool)
                super().__exit__(*error)

        def end(index: int, pool: Any) -> None:
            if pool not in card.open:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            card.open.remove(pool)

        patch.setattr("torch.cuda.Stream", lambda device: card.own)
        patch.setattr("torch.cuda.graph_pool_handle", lambda: (0, 1))
        patch.setattr("torch.cuda.current_stream", lambda device: card.current)
        patch.setattr("torch.cuda.set_stream", lambda stream: setattr(card, "current", stream))
        patch.setattr("torch.cuda.stream", Stream)
        patch.setattr("torch.cuda.graph", Graph)
        patch.setattr("torch.cuda.CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        patch.setattr("torch._C._cuda_endAllocateToPool", end, raising=False)


@pytest.mark.parametrize("fails", ["", "begin", "forward", "end", "warm-up"])
def test_after_a_capture_that_fails_the_usual_stream_and_memory_are_used(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch, fails=fails)
    runs: list[str] = []

    def forward() -> None:
        runs.append(card.current.name)
        if fails == "warm-up" or (fails == "forward" and len(runs) == 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    failing: Any = pytest.raises(NotRecorded) if fails else nullcontext()
    with failing:
        CudaGraphs(CUDA).record(forward)
    assert card.current is card.usual
    assert card.open == []
    assert set(runs) == {"own"}
