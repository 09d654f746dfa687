"""Rows times packed weights (native/gemm.h): within the bounds of rounding, the same in any batch."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.engine.cpu.build import NoCompiler, build

TYPES = {"f32": 0, "bf16": 1, "i8": 2, "w8": 3}
SCALED = ("i8", "w8")
SHIMS = (
    "native_gemm.cpp",
    "native_gemm_pairs.cpp",
    "native_gemm_avx2.cpp",
    "native_gemm_portable.cpp",
)
HERE = Path(__file__).parent
GUARD = 64  # bytes behind each piece of memory that must stay as they were
UNIT = 2.0**-24  # of rounding to fp32


@cache
def library(shim: str) -> ctypes.CDLL:
    try:
        loaded = build([str(HERE / shim)], "test-gemm")
    except NoCompiler as error:
        pytest.skip(str(error))
    for name in ("bytes_of_weight", "bytes_of_rows", "bytes_of_pairs", "bytes_of_blocks"):
        getattr(loaded, name).restype = ctypes.c_long
    return loaded


class Memory:
    """Bytes at a multiple of 64, with a guard behind them."""

    def __init__(self, size: int) -> None:
        room = torch.full((size + 64 + GUARD,), 0xA5, dtype=torch.uint8)
        self.bytes = room[-room.data_ptr() % 64 :]
        self.size = size

    def check(self) -> None:
        assert (self.bytes[self.size :][:GUARD] == 0xA5).all(), "written past the end"


def at(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def longs(*values: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(value) for value in values]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N, K], packed from whatever strides and type it has."""

    shim: str
    kind: str
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        lib, number, (n, k) = library(self.shim), TYPES[self.kind], self.weight.shape
        panels = Memory(lib.bytes_of_weight(number, *longs(n, k)))
        scales = torch.full((n + 1,), 7.0) if self.kind in SCALED else None
        is_bf16 = int(self.weight.dtype == torch.bfloat16)
        layout = longs(*self.weight.stride(), n, k)
        lib.pack_weight(number, is_bf16, at(self.weight), *layout, at(panels.bytes), at(scales), 3)
        panels.check()
        assert scales is None or scales[n] == 7.0
        object.__setattr__(self, "panels", panels.bytes)
        object.__setattr__(self, "scales", scales)

    def __call__(self, rows: Tensor, threads: int = 1) -> Tensor:
        lib, number, (n, k) = library(self.shim), TYPES[self.kind], self.weight.shape
        m = rows.shape[0]
        prepared = Memory(lib.bytes_of_rows(number, *longs(m, k)))
        out = torch.full((m, n + 3), 5.0)
        lib.multiply_rows(
            number, *longs(n, k), at(self.panels), at(self.scales), at(self.bias),
            at(rows), *longs(rows.stride(0)), at(prepared.bytes), *longs(m),
            at(out), *longs(out.stride(0)), threads,
        )  # fmt: skip
        prepared.check()
        assert (out[:, n:] == 5.0).all(), "written beside the result"
        return out[:, :n]


def chosen_products(experts: list[Packed], chosen: Tensor, rows: Tensor, threads: int) -> Tensor:
    """[m, slots, n]: rows [m, k] or [m, slots, k] times the experts that `chosen` [m, slots] names."""
    shim, kind, (n, k) = experts[0].shim, experts[0].kind, experts[0].weight.shape
    lib, number, (m, slots) = library(shim), TYPES[kind], chosen.shape
    prepared = Memory(lib.bytes_of_pairs(number, *longs(m * slots, k)))
    out, numbers = torch.full((m * slots * n + 1,), 5.0), chosen.float().contiguous()

    def places(tensors: list[Tensor | None]) -> Any:
        return (ctypes.c_void_p * len(experts))(*(at(each) for each in tensors))

    lib.multiply_chosen(
        number, *longs(n, k, len(experts)), places([each.panels for each in experts]),
        places([each.scales for each in experts]) if kind in SCALED else None,
        places([each.bias for each in experts]), at(numbers), *longs(slots), at(rows),
        *longs(rows.stride(0), rows.stride(1) if rows.ndim == 3 else 0), at(prepared.bytes),
        *longs(m), at(out), threads,
    )  # fmt: skip
    prepared.check()
    assert out[-1] == 5.0, "written past the end"
    return out[:-1].view(m, slots, n)


def error_bound(kind: str, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What |result - exact| can be at most, [M, N], in float64.

    A chain of K sums and products, each rounded, is off by K + 1 units of what its terms add up to.
    bf16: each value is off by 2^-8 of itself (rounded), so a product by 2^-7 and a little.
    int8: each value is off by half a step, and the scales and the last product are rounded too.
    w8: bf16's rows and int8's weights.
    """
    rows, weight = rows.double().abs(), weight.double().abs()
    chain = 2 * (rows.shape[1] + 2) * UNIT * (rows @ weight.T + bias.double().abs())
    if kind == "f32":
        return chain
    if kind == "bf16":
        return chain * 1.01 + (2.0**-7 + 2.0**-16) * (rows @ weight.T)
    step = weight.amax(1, keepdim=True) / 127
    if kind == "w8":
        halves = rows.sum(1, keepdim=True) @ step.T / 2
        return 1.0001 * halves + (2.0**-8 + 2.0**-15) * (rows @ weight.T + halves) + 1.01 * chain
    row_step = rows.amax(1, keepdim=True) / 127
    halves = rows.sum(1, keepdim=True) @ step.T / 2
    halves += row_step @ (weight + step / 2).sum(1, keepdim=True).T / 2
    return 1.0001 * halves + 16 * UNIT * (rows @ weight.T + halves + bias.double().abs())


SHAPES = [(1, 1), (1, 64), (64, 1), (65, 3), (63, 127), (257, 66), (130, 1031), (70, 4101)]
shims = pytest.mark.parametrize("shim", SHIMS)
kinds = pytest.mark.parametrize("kind", TYPES)


@shims
@kinds
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_are_within_the_bounds_of_rounding(shim: str, kind: str, n: int, k: int) -> None:
    torch.manual_seed(n * k)
    weight, bias = torch.randn(n, k), torch.randn(n)
    packed, plain = Packed(shim, kind, weight, bias), Packed(shim, kind, weight)
    for m, threads in ((1, 1), (2, 5), (6, 2), (7, 1), (13, 3), (70, 128), (61, 1)):
        rows = torch.randn(m, k + 5)[:, :k]  # rows apart from each other
        exact = rows.double() @ weight.double().T
        bound = error_bound(kind, rows, weight, bias)
        assert ((packed(rows, threads) - (exact + bias)).abs() <= bound).all()
        assert ((plain(rows, threads) - exact).abs() <= bound).all()


@shims
@kinds
def test_a_weight_stored_the_other_way_round_packs_the_same(shim: str, kind: str) -> None:
    weight = torch.randn(100, 37)
    rows = torch.randn(9, 37)
    other_way = weight.T.contiguous().T
    assert other_way.stride() == (1, 100)
    assert torch.equal(Packed(shim, kind, other_way)(rows), Packed(shim, kind, weight)(rows))


@shims
@kinds
def test_a_weight_in_bf16_packs_as_its_values_in_fp32(shim: str, kind: str) -> None:
    weight = torch.randn(100, 37).bfloat16()
    rows = torch.randn(9, 37)
    assert torch.equal(Packed(shim, kind, weight)(rows), Packed(shim, kind, weight.float())(rows))


@shims
@pytest.mark.parametrize("k", [3, 260, 5001])
def test_bf16_sums_of_bf16_values_are_as_exact_as_fp32(shim: str, k: int) -> None:
    weight, rows = torch.randn(70, k).bfloat16().float(), torch.randn(8, k).bfloat16().float()
    exact = rows.double() @ weight.double().T
    bound = error_bound("f32", rows, weight, torch.zeros(70))
    assert ((Packed(shim, "bf16", weight)(rows) - exact).abs() <= bound).all()


@shims
@pytest.mark.parametrize("k", [1, 7, 130, 66_001])
def test_integers_up_to_127_are_exact_in_int8(shim: str, k: int) -> None:
    weight, rows = torch.randint(-127, 128, (67, k)), torch.randint(-127, 128, (8, k))
    weight[:, 0], rows[:, 0] = 127, -127  # so that all scales are 1
    weight[0], rows[0], rows[1] = 127, 127, -127  # the largest sums there are
    product = Packed(shim, "i8", weight.float())(rows.float())
    assert torch.equal(product, (rows @ weight.T).float())


@pytest.mark.parametrize("shape", [(130, 67), (65, 2100), (66, 4200)])
@shims
@kinds
def test_a_rows_bits_do_not_depend_on_its_company(
    shim: str, kind: str, shape: tuple[int, int]
) -> None:
    packed = Packed(shim, kind, torch.randn(shape), torch.randn(shape[0]))
    rows = torch.randn(40, shape[1])
    alone = torch.cat([packed(row[None]) for row in rows])

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.lists(st.integers(0, 39), min_size=1, max_size=70), st.integers(1, 40))
    def check(chosen: list[int], threads: int) -> None:
        assert torch.equal(packed(rows[chosen], threads), alone[chosen])

    check()
    assert torch.equal(packed(rows.repeat(2, 1)), alone.repeat(2, 1))  # so many are widened before


@shims
@kinds
@pytest.mark.parametrize(("n", "k"), [(130, 67), (64, 1030)])
def test_in_a_grouped_product_a_row_has_the_bits_it_has_with_its_expert_alone(
    shim: str, kind: str, n: int, k: int
) -> None:
    """Few and many rows for an expert, none for another; one row for all slots, or one for each."""
    experts = [Packed(shim, kind, torch.randn(n, k), torch.randn(n)) for _ in range(5)]
    for m, threads in ((1, 1), (3, 4), (150, 3)):
        chosen = torch.randint(0, 3, (m, 3))  # about 150 for each, more than are widened at once
        chosen[0, 0] = 4
        for rows in (torch.randn(m, k), torch.randn(m, 3, k)):
            alone = torch.stack([each(rows.reshape(-1, k)) for each in experts])
            of_each = alone.view(5, m, -1, n).expand(5, m, 3, n)  # of the row of each slot
            wanted = of_each.gather(0, chosen[None, :, :, None].expand(1, m, 3, n))[0]
            assert torch.equal(chosen_products(experts, chosen, rows, threads), wanted)


@shims
def test_a_number_of_no_expert_reads_nothing_out_of_bounds(shim: str) -> None:
    experts = [Packed(shim, "f32", torch.randn(70, 35), torch.randn(70)) for _ in range(2)]
    chosen, rows = torch.tensor([[float("nan"), -1.0], [2.0, 1e30]]), torch.randn(2, 35)
    found = chosen_products(experts, chosen, rows, 2)
    assert torch.equal(found, experts[0](rows)[:, None].expand(2, 2, 70))


@shims
@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(shim: str, kind: str, bad: float) -> None:
    packed = Packed(shim, kind, torch.randn(70, 35), torch.randn(70))
    rows = torch.randn(9, 35)
    clean = packed(rows)
    rows[4, 34] = bad
    product = packed(rows, 2)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(product[others], clean[others])
    assert not product[4].isfinite().any()


@shims
def test_an_int8_channel_that_is_not_finite_shows(shim: str) -> None:
    weight = torch.randn(70, 35)
    clean = Packed(shim, "i8", weight)(torch.ones(2, 35))
    weight[66, 3] = float("nan")
    product = Packed(shim, "i8", weight)(torch.ones(2, 35))
    assert product[:, 66].isnan().all()
    assert torch.equal(product[:, :66], clean[:, :66])


@shims
@kinds
def test_zeros_give_the_bias(shim: str, kind: str) -> None:
    bias = torch.randn(70)
    product = Packed(shim, kind, torch.zeros(70, 35), bias)(torch.zeros(3, 35))
    assert torch.equal(product, bias.expand(3, 70))
