"""The benchmark of products compiles and runs; what it measures is its own business."""

import pytest
import torch

from baton.engine.cpu.build import NoCompiler
from tools.benchmarks.gemm import TYPES, OneDnn, Ours, load_library


@pytest.mark.parametrize("kind", TYPES)
def test_both_sides_take_the_time_of_a_product(kind: str) -> None:
    weight, rows = torch.randn(70, 40), torch.randn(9, 40)
    try:
        ours = Ours(load_library(), kind, weight, copies=2)
    except NoCompiler as why:
        pytest.skip(str(why))
    before = torch.get_num_threads()
    try:
        assert ours.timer(rows, 2)() > 0
        if kind != "i8":  # torch has its int8 operation on some CPUs only
            assert OneDnn(kind, weight, copies=2).timer(rows, 2)() > 0
    finally:
        torch.set_num_threads(before)
