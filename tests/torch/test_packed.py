"""Linears packed for oneDNN: the same results, in every family that torch runs. Which dtypes can be
packed depends on the CPU and on torch: where one cannot, the model stays as it is."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from baton.engine.cpu import select
from baton.engine.cpu.packed import PackedLinear, can_pack, pack_linears
from baton.engine.errors import CompileError
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import self_test
from baton.errors import ModelError
from baton.model_files import resolve_model
from tests.torch.families import FAMILIES, make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_passes_the_self_test_of_the_plain_one(
    family: str, dtype: torch.dtype
) -> None:
    plain = make_model(family).to(dtype)
    packed = copy.deepcopy(plain)
    assert (pack_linears(packed) > 0) == can_pack(dtype)
    self_test(Runner(packed), plain, discover_layout(plain, 16, dtype))


def test_every_linear_of_gpt2_is_packed() -> None:
    model = make_model("gpt2")
    assert pack_linears(model) == (4 * model.config.n_layer + 1 if can_pack(torch.float32) else 0)


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch packs no float32 weights here")
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_packed_linear_is_a_linear(rows: int) -> None:
    linear = torch.nn.Linear(37, 53)
    x = torch.randn(1, rows, 37)
    ours = PackedLinear(linear.weight.detach(), linear.bias)(x)
    torch.testing.assert_close(ours, linear(x), atol=1e-5, rtol=1e-5)


def test_where_a_dtype_is_refused_its_linears_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr("torch.ops.mkldnn._reorder_linear_weight", refuse, raising=False)
    model = make_model("llama")
    assert not can_pack(torch.float32)
    assert pack_linears(model) == 0
    self_test(Runner(model), model, discover_layout(model, 16, torch.float32))


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch packs no float32 weights here")
def test_a_refused_linear_does_not_keep_the_others_from_being_packed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4))
    assert not can_pack(torch.float64)
    assert pack_linears(model) == 1
    assert [type(each) for each in model] == [torch.nn.Linear, PackedLinear]


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch packs no float32 weights here")
def test_a_packed_weight_keeps_its_dtype_shape_and_device_and_no_numbers() -> None:
    linear = torch.nn.Linear(37, 53)
    packed = PackedLinear(linear.weight.detach(), linear.bias)
    for name in ("dtype", "shape", "device", "ndim"):
        assert getattr(packed.weight, name) == getattr(linear.weight, name)
    assert packed.weight.isnan().all()  # who computes with it does not go unnoticed
    assert packed.weight.untyped_storage().nbytes() == 4


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch packs no float32 weights here")
def test_a_model_that_reads_the_numbers_of_a_packed_weight_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def itself(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(x @ self.up_proj.weight.T)

    def refuse(*_: object, **__: object) -> None:
        raise CompileError("not today")

    monkeypatch.setattr(LlamaMLP, "forward", itself)
    monkeypatch.setattr(select, "compiled", refuse)
    with pytest.raises(
        ModelError, match="LlamaForCausalLM cannot be served on a CPU: its code reads weights"
    ):
        select.on_cpu(
            resolve_model("demo"), lambda: make_model("llama"),
            weights=torch.float32, cache_dtype=torch.float32, block_size=16,
        )  # fmt: skip
