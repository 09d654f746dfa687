"""Weights of 4 and 8 bits (native/blocks.h): products have the bits of those with the restored floats."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.engine.cpu.blocks import Blocks
from baton.engine.cpu.structures import OFFSETS
from tests.torch.test_native_gemm import Memory, Packed, at, library, longs, shims

TYPES = {4: 4, 8: 5}


@dataclass(frozen=True)
class Case:
    """A matrix with random integers, and its panels."""

    shim: str
    blocks: Blocks

    @property
    def about(self) -> tuple[Any, ...]:
        it = self.blocks
        halves = int(it.scales.dtype == torch.float16)
        return (
            TYPES[it.bits],
            *longs(*it.values.shape, it.block),
            OFFSETS.index(it.offset),
            halves,
        )

    def panels(self) -> Tensor:
        packed = self.blocks.packed()
        assert len(packed) == library(self.shim).bytes_of_blocks(*self.about)
        memory = Memory(len(packed))
        memory.bytes[: len(packed)] = packed
        return memory.bytes

    def __call__(self, rows: Tensor, bias: Tensor | None = None, threads: int = 1) -> Tensor:
        n = self.blocks.values.shape[0]
        out = torch.full((len(rows), n + 3), 5.0)
        panels = self.panels()
        library(self.shim).multiply_blocked(
            *self.about, at(panels), at(bias), at(rows), *longs(rows.stride(0), len(rows)),
            at(out), *longs(out.stride(0)), threads,
        )  # fmt: skip
        assert (out[:, n:] == 5.0).all(), "written beside the result"
        return out[:, :n]


def made(n: int, k: int, bits: int, block: int, offset: str, halves: bool) -> Blocks:
    """Random integers, the ends of their range among them. Scales in f32 have all of their bits where
    nothing is beside them, else 11."""
    random = torch.Generator().manual_seed(n * k + bits + block)
    most = 1 << bits
    values = torch.randint(0, most, (n, k), generator=random)
    values[0, 0], values[-1, -1] = most - 1, 0
    shape = (n, -(-k // block))
    scales = torch.rand(shape, generator=random) / most + 1e-6  # the smallest are denormal in f16
    beside = None
    if offset != "none" or halves:
        scales = scales.half()
    if offset == "zeros":
        beside = torch.randint(0, most, shape, generator=random).half()
    elif offset == "minima":
        beside = -torch.rand(shape, generator=random).half()
    if not halves:
        scales, beside = scales.float(), None if beside is None else beside.float()
    small = (values - most // 2).to(torch.int8) if offset == "none" else values.to(torch.uint8)
    return Blocks(bits, block, small, scales, **{} if beside is None else {offset: beside})


def by_numpy(it: Blocks) -> np.ndarray[Any, Any]:
    """The definition, number by number, in float64 and rounded once."""
    wide = np.empty(it.values.shape)
    for row, column in np.ndindex(*it.values.shape):
        block = column // it.block
        number, scale = float(it.values[row, column]), float(it.scales[row, block])
        zero = 0.0 if it.zeros is None else float(it.zeros[row, block])
        least = 0.0 if it.minima is None else float(it.minima[row, block])
        wide[row, column] = (number - zero) * scale + least
    return wide.astype(np.float32)


SHAPES = [(1, 8, 8), (64, 64, 32), (65, 96, 64), (70, 1032, 128), (130, 160, 160)]
formats = pytest.mark.parametrize(
    ("bits", "offset", "halves"),
    [(bits, offset, halves) for bits in (4, 8) for offset in OFFSETS for halves in (True, False)],
)


@formats
def test_the_floats_are_those_of_the_definition(bits: int, offset: str, halves: bool) -> None:
    it = made(67, 40, bits, 16, offset, halves)
    assert np.array_equal(it.restored().numpy(), by_numpy(it))


@shims
@formats
def test_a_row_unpacks_to_the_same_floats(shim: str, bits: int, offset: str, halves: bool) -> None:
    it = made(67, 40, bits, 16, offset, halves)
    case, found = Case(shim, it), torch.empty(40)
    panels = case.panels()
    for channel in (0, 1, 63, 64, 66):
        library(shim).unpack_blocked(*case.about, at(panels), *longs(channel), at(found))
        assert torch.equal(found, it.restored()[channel])


@shims
@formats
@pytest.mark.parametrize(("n", "k", "block"), SHAPES)
def test_products_have_the_bits_of_those_with_floats(
    shim: str, bits: int, offset: str, halves: bool, n: int, k: int, block: int
) -> None:
    it = made(n, k, bits, block, offset, halves)
    case, bias = Case(shim, it), torch.randn(n)
    plain = Packed(shim, "f32", it.restored(), bias)
    for m, threads in ((1, 1), (2, 3), (3, 1), (7, 2), (40, 5)):
        rows = torch.randn(m, k + 5)[:, :k]  # rows apart from each other
        assert torch.equal(case(rows, bias, threads), plain(rows))


@shims
def test_a_rows_bits_do_not_depend_on_its_company(shim: str) -> None:
    case = Case(shim, made(70, 264, 4, 32, "minima", True))
    rows = torch.randn(40, 264)
    alone = torch.cat([case(row[None]) for row in rows])

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.lists(st.integers(0, 39), min_size=1, max_size=70), st.integers(1, 9))
    def check(chosen: list[int], threads: int) -> None:
        assert torch.equal(case(rows[chosen], None, threads), alone[chosen])

    check()


@pytest.mark.parametrize(
    "change",
    [
        {"block": 12},
        {"bits": 3},
        {"scales": torch.ones(4, 9)},
        {"scales": torch.ones(4, 2).bfloat16()},
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any]) -> None:
    good = dict(
        bits=4, block=8, values=torch.zeros(4, 16, dtype=torch.int8), scales=torch.ones(4, 2)
    )
    Blocks(**good)
    with pytest.raises(ValueError, match="got"):
        Blocks(**good | change)
