"""Greedy sampling in native code: what torch says of the same rows, for every width and oddity."""

import ctypes
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.boot import Engine, boot
from baton.engine.cpu.build import NoCompiler, build
from baton.engine.cpu.forward import NativeRunner
from baton.engine.pool import Pool
from baton.host import core_numbers, run_on
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from sampler.narrow import greedy

INFINITY = float("inf")


@cache
def library() -> ctypes.CDLL:
    try:
        return build([str(Path(__file__).parent / "native_argmax.cpp")], "test-argmax")
    except NoCompiler as error:
        pytest.skip(str(error))


def found(logits: torch.Tensor, threads: int) -> list[int | None]:
    ids = torch.full((len(logits),), -7)
    library().find_argmax(
        *(ctypes.c_void_p(logits.data_ptr()), *map(ctypes.c_long, logits.shape)),
        *(ctypes.c_long(logits.stride(0)), ctypes.c_void_p(ids.data_ptr()), threads),
    )
    return [None if each == -1 else each for each in ids.tolist()]


@pytest.fixture(scope="module")
def engine(native: None) -> Engine:
    it = boot(resolve_model("demo"), device="cpu", dtype="float32", block_size=16)
    assert isinstance(it.runner, NativeRunner), it.runner.backend
    return it


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.integers(1, 400), st.integers(0, 9), st.integers(1, 7), st.integers(0, 2**31), st.booleans()
)
def test_it_is_what_torch_finds(width: int, rows: int, threads: int, seed: int, ties: bool) -> None:
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width + 5, generator=dice)[:, :width]
    logits = logits.round() if ties else logits
    highest = logits.max(dim=-1, keepdim=True).values
    first = (logits == highest).int().argmax(dim=-1)  # the first of the equal ones
    assert found(logits, threads) == first.tolist() == greedy(logits)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("at", [0, 15, 16, 700, 1023, 1030])
@pytest.mark.parametrize("what", [float("nan"), INFINITY])
def test_a_row_that_is_not_sound_has_none(what: float, at: int, threads: int) -> None:
    logits = torch.randn(3, 1031)
    logits[1, at] = what
    expected = greedy(logits)
    assert expected[1] is None
    assert found(logits, threads) == expected


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_infinities_below(threads: int) -> None:
    logits = torch.full((2, 300), -INFINITY)
    logits[1, 200] = -5.0
    assert found(logits, threads) == greedy(logits) == [None, 200]


def test_a_run_finds_what_its_logits_say(engine: Engine) -> None:
    pool = Pool.private(engine.layout, 6, engine.device)
    rows = [
        Row([5, 6, 7], 0, [0, 1], Logits.ALL),
        Row([8], 0, [2], Logits.LAST),
        Row([9, 10], 0, [3]),
        Row(list(range(20)), 0, [4, 5], Logits.LAST),
    ]
    assert engine.runner.greedy(pool, rows) == greedy(engine.runner.run(pool, rows))
    assert engine.runner.greedy(pool, rows[2:3]) == []


@pytest.mark.skipif(len(core_numbers()) < 2, reason="on one core no helper has its own")
def test_a_helper_returns_to_its_core_when_the_process_was_moved(engine: Engine) -> None:
    cores = core_numbers()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    pool = Pool.private(engine.layout, 1, engine.device)
    try:
        for _ in range(2):
            run_on(cores)  # what a worker does that is handed cores: every thread, helpers as well
            assert not _threads_on(cores[-1])
            engine.runner.fill(pool, [Row([1], 0, [0])])
            assert len(_threads_on(cores[-1])) == 1
    finally:
        torch.set_num_threads(before)
        run_on(cores)


def _threads_on(core: int) -> list[str]:
    """Threads of this process that may run there and nowhere else."""
    tasks = os.listdir("/proc/self/task")
    return [task for task in tasks if os.sched_getaffinity(int(task)) == {core}]
