"""FP8 weights: how far a number may move, and that both products are meant to be the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baton.engine.boot import boot
from baton.engine.cuda.fp8 import (
    FP8,
    LARGEST,
    MULTIPLE,
    Fp8Linear,
    dequantized,
    in_fp8,
    quantize,
    quantize_linears,
)
from baton.engine.cuda.select import with_fp8
from baton.engine.device import refuse_without_fp8
from baton.engine.loading import prepare
from baton.engine.runner import Runner
from baton.engine.selftest import in_torch
from baton.errors import InputError, ModelError
from baton.model_files import resolve_model
from tests.torch.catalog import tiny_config
from tests.torch.families import make_model, random_model

NUMBERS = st.floats(-1e4, 1e4, width=32)


@given(st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=4))
def test_no_number_moves_further_than_three_bits_of_mantissa_allow(rows: list[list[float]]) -> None:
    given_ = torch.tensor(rows)
    found = quantize(given_)
    back = found.values.float() * found.scales
    assert found.values.dtype == FP8
    assert (found.values.float().abs() <= LARGEST).all()
    normal, below = given_.abs() / 16, found.scales * 2**-10  # half a step; of the smallest ones
    assert ((back - given_).abs() <= torch.maximum(normal, below) * 1.001).all()


def test_a_rows_scale_does_not_depend_on_its_neighbours() -> None:
    rows = torch.randn(5, 32) * torch.tensor([[1e-6], [1.0], [1e6], [1.0], [0.0]])
    together = quantize(rows)
    for i, row in enumerate(rows):
        alone = quantize(row[None])
        assert torch.equal(alone.values[0].float(), together.values[i].float())
        assert torch.equal(alone.scales[0], together.scales[i])
    assert not together.values[4].float().any()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_gives_what_the_plain_one_gives_within_its_bits(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 48, bias=bias).requires_grad_(False)
    rows = torch.randn(2, 7, 256)
    found = Fp8Linear(linear.weight, linear.bias, dequantized)(rows)
    expected = linear(rows)
    assert found.shape == expected.shape
    # 256 products, each off by 1/16 twice at most, in no one direction
    assert (found - expected).abs().max() < 256**0.5 * (1 / 8) * linear.weight.abs().max() * 1.5
    assert (found - expected).abs().max() > 0


@pytest.mark.parametrize("turned", [False, True])
def test_the_product_of_the_cards_is_the_dequantized_one(turned: bool) -> None:
    """torch has it on the CPU too, since 2.13; a weight may come turned round (Conv1D)."""
    torch.manual_seed(0)
    weight = torch.randn(256, 96).t() if turned else torch.randn(96, 256)
    given_ = quantize(torch.randn(7, 256)), quantize(weight)
    try:
        found = in_fp8(*given_)
    except RuntimeError as error:
        pytest.skip(f"this torch has none on the CPU: {str(error)[:80]}")
    expected = dequantized(*given_)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_model_in_fp8_says_roughly_the_same(family: str) -> None:
    model = make_model(family)
    runner, layout = in_torch(model, torch.float32, 4)
    with_fp8(runner, layout, dequantized)
    assert runner.backend == "in torch, fp8 weights"
    linears = [each for each in model.modules() if isinstance(each, Fp8Linear)]
    assert len(linears) >= 2 * 4  # of each layer
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear


def test_a_product_that_is_wrong_is_refused() -> None:
    runner, layout = in_torch(make_model("llama"), torch.float32, 4)
    with pytest.raises(ModelError, match="in fp8 our logits differ"):
        with_fp8(runner, layout, lambda rows, weight: -dequantized(rows, weight))


def test_linears_of_unfit_sizes_stay() -> None:
    model = make_model("opt")
    model.model.decoder.layers[0].fc1 = nn.Linear(64, 90)
    before = sum(type(each) is nn.Linear for each in model.modules())
    done = quantize_linears(model, dequantized)
    assert type(model.model.decoder.layers[0].fc1) is nn.Linear
    assert done == before - 2  # that one and the head
    assert isinstance(Runner(model), Runner)


def test_routers_stay() -> None:
    config = tiny_config("jetmoe")
    config.num_local_experts = MULTIPLE  # a size that would fit
    model = prepare(random_model(config))
    routers = [each for name, each in model.named_modules() if name.endswith("router.layer")]
    assert {len(each.weight) for each in routers} == {MULTIPLE}
    quantize_linears(model, dequantized)
    after = [each for name, each in model.named_modules() if name.endswith("router.layer")]
    assert after == routers
    assert any(isinstance(each, Fp8Linear) for each in model.modules())


def test_fp8_is_refused_without_the_card_and_what_is_there_is_named() -> None:
    with pytest.raises(InputError, match=r"compute capability 8\.9 .* threads.* has none"):
        boot(resolve_model("demo"), device="cpu", dtype="fp8", block_size=16)


@pytest.mark.parametrize(("found", "good"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_the_cards_capability_decides(
    found: tuple[int, int], good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: found)
    monkeypatch.setattr("baton.engine.device.describe_device", lambda device: "A100")
    if good:
        return refuse_without_fp8(torch.device("cuda:0"))
    with pytest.raises(InputError, match=r"A100 has 8\.0: use another dtype"):
        refuse_without_fp8(torch.device("cuda:0"))
