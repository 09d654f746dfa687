"""Greedy sampling in native code: what torch says of the same rows, for every width and oddity."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.boot import boot
from baton.engine.fast.forward import NativeRunner
from baton.host import core_numbers, run_on
from baton.model_files import resolve_model
from sampler.narrow import likeliest


@pytest.fixture(scope="module")
def runner() -> NativeRunner:
    found = boot(resolve_model("demo"), device="cpu", dtype="float32", block_size=16).runner
    if not isinstance(found, NativeRunner):
        pytest.skip(f"no native code here: {found.how}")
    return found


def test_it_is_what_torch_finds(runner: NativeRunner) -> None:
    @settings(max_examples=150, deadline=None, database=None)
    @given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
    def check(width: int, rows: int, seed: int, ties: bool) -> None:
        dice = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, width + 5, generator=dice)[:, :width]
        logits = logits.round() if ties else logits
        highest, places = runner.likeliest(logits)
        assert torch.equal(highest, logits.max(dim=-1).values)
        first = (logits == highest[:, None]).int().argmax(dim=-1)  # the first of the equal ones
        assert torch.equal(places, first)
        assert torch.equal(places, likeliest(logits)[1])

    check()


@pytest.mark.parametrize("at", [0, 15, 16, 1023, 1030])
def test_one_that_is_not_a_number_shows(runner: NativeRunner, at: int) -> None:
    logits = torch.randn(3, 1031)
    logits[1, at] = float("nan")
    highest, _ = runner.likeliest(logits)
    assert highest.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("every", [float("inf"), -float("inf")])
def test_infinities_are_told(runner: NativeRunner, every: float) -> None:
    highest, places = runner.likeliest(torch.full((2, 100), every))
    assert highest.tolist() == [every, every]
    assert places.tolist() == [0, 0]


def test_no_rows_are_no_work(runner: NativeRunner) -> None:
    highest, places = runner.likeliest(torch.empty(0, 100))
    assert highest.shape == places.shape == (0,)


@pytest.mark.skipif(len(core_numbers()) < 2, reason="on one core no helper has its own")
def test_a_helper_returns_to_its_core_when_the_process_was_moved(runner: NativeRunner) -> None:
    cores = core_numbers()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            run_on(cores)  # what a worker does that is handed cores: every thread, helpers as well
            assert not _threads_on(cores[-1])
            runner.likeliest(torch.zeros(16, 50_000))  # enough for two threads
            assert len(_threads_on(cores[-1])) == 1
    finally:
        torch.set_num_threads(before)
        run_on(cores)


def _threads_on(core: int) -> list[str]:
    """Threads of this process that may run there and nowhere else."""
    tasks = os.listdir("/proc/self/task")
    return [task for task in tasks if os.sched_getaffinity(int(task)) == {core}]
