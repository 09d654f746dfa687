"""Linears packed for oneDNN: the same results, in every family that torch runs."""

import copy

import pytest
import torch

from baton.engine.cpu.packed import PackedLinear, pack_linears
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import self_test
from tests.torch.families import FAMILIES, make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_passes_the_self_test_of_the_plain_one(
    family: str, dtype: torch.dtype
) -> None:
    plain = make_model(family).to(dtype)
    packed = copy.deepcopy(plain)
    assert pack_linears(packed) > 0
    self_test(Runner(packed), plain, discover_layout(plain, 16, dtype))


def test_every_linear_of_gpt2_is_packed() -> None:
    model = make_model("gpt2")
    assert pack_linears(model) == 4 * model.config.n_layer + 1


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_packed_linear_is_a_linear(rows: int) -> None:
    linear = torch.nn.Linear(37, 53)
    x = torch.randn(1, rows, 37)
    ours = PackedLinear(linear.weight.detach(), linear.bias)(x)
    torch.testing.assert_close(ours, linear(x), atol=1e-5, rtol=1e-5)


def test_where_packing_is_refused_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no oneDNN here")

    monkeypatch.setattr("torch.ops.mkldnn._reorder_linear_weight", refuse, raising=False)
    model = make_model("llama")
    assert pack_linears(model) == 0
    self_test(Runner(model), model, discover_layout(model, 16, torch.float32))
