"""What chooses experts, or weighs a whole one, is never quantized; everything else is."""

import tempfile

import pytest
import torch

from baton.engine.attention import NAME
from baton.engine.cpu import structures as native
from baton.engine.cpu.compile import compile_model
from baton.engine.probe import discover_layout
from tests.torch.catalog import tiny_model
from tests.torch.test_engine_parity import BLOCK
from tests.torch.test_native_program import library

ROUTERS = {  # what their weights are called
    "mixtral": ("gate.weight",),
    "qwen2_moe": ("gate.weight",),  # and shared_expert_gate.weight, which has one output
    "gpt_oss": ("router.weight",),  # with a bias
    "deepseek_v3": ("mlp.gate.weight",),  # by groups, behind a dense layer
    "granitemoe": ("block_sparse_moe.router.weight",),
    "llama": (),
}


def full_width(family: str, weights: torch.dtype) -> tuple[list[int], list[int], int]:
    """The outputs of the routers of such a model; those of the products in fp32 of its program for these
    weights; and how many products are in neither fp32 nor `weights`."""
    model = tiny_model(family, attention=NAME)
    layout = discover_layout(model, BLOCK, torch.bfloat16)
    with tempfile.TemporaryFile() as file:
        compile_model(file, library(), model, layout, weights)
        file.seek(0)
        data = file.read()
    spec = native.Spec.from_buffer_copy(data)
    products = (native.Weight * spec.weight_count).from_buffer_copy(data, spec.weights)
    exact = [each.n for each in products if each.type == native.WEIGHTS[torch.float32]]
    others = sum(each.type == native.WEIGHTS[weights] for each in products)
    known = [len(each) for name, each in model.named_parameters() if name.endswith(ROUTERS[family])]
    return known, exact, len(products) - len(exact) - others


@pytest.mark.parametrize("weights", native.SCALED, ids=str)
@pytest.mark.parametrize("family", ROUTERS)
def test_routers_keep_their_width_and_nothing_else_does(family: str, weights: torch.dtype) -> None:
    routers, exact, others = full_width(family, weights)
    assert sum(routers) == sum(exact)  # two with the same rows are one product
    assert others == 0
    assert bool(routers) is bool(ROUTERS[family])


def test_without_8_bits_all_weights_are_of_one_type() -> None:
    routers, exact, others = full_width("mixtral", torch.bfloat16)
    assert routers
    assert not exact
    assert others == 0
