"""The fast path on a GPU: captured steps, FlashInfer, FP8, each against its slow sibling.

Run where there is a GPU: `pytest tests/gpu -m gpu`."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from baton.engine.attention import NAME, Kernel
from baton.engine.batch import Batch
from baton.engine.boot import boot
from baton.engine.cuda.fp8 import dequantized, in_fp8, quantize
from baton.engine.cuda.graphs import CudaGraphs, GraphRunner, StaticAttention
from baton.engine.cuda.select import fastest, on_cuda, trial, with_flashinfer, with_fp8
from baton.engine.device import FP8_CAPABILITY
from baton.engine.loading import prepare
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.engine.selftest import compare, in_torch
from baton.kv.row import Logits, Row
from baton.model_files import resolve_model
from tests.torch.families import make_model
from tests.torch.test_graphs import LENGTHS, STEPS, Play

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda:0")
DENSE = ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox", "phi3", "opt"]
needs_flashinfer = pytest.mark.skipif(
    find_spec("flashinfer") is None, reason="needs the package flashinfer"
)


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability(GPU) if torch.cuda.device_count() else (0, 0)


needs_fp8 = pytest.mark.skipif(capability() < FP8_CAPABILITY, reason="needs a GPU with FP8")


def graphs() -> CudaGraphs:
    return CudaGraphs(GPU)


def on_gpu(family: str, dtype: torch.dtype = torch.float32) -> tuple[Runner, Any]:
    model: Any = make_model(family).to(GPU, dtype)
    return Runner(model), discover_layout(model, 4, dtype)


def usual_heads(**more: Any) -> PreTrainedModel:
    """A small model in bf16 whose heads have 64 numbers, as FlashInfer wants them."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "gemma2" if more else "qwen2", vocab_size=320, hidden_size=256, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=64,
        initializer_range=0.1, max_position_embeddings=256, **more,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=NAME
    )
    return prepare(model.to(GPU))


@pytest.mark.parametrize("family", [*DENSE, "deepseek_v3", "gpt_oss"])
def test_captured_steps_say_what_uncaptured_ones_say(family: str) -> None:
    slow, layout = on_gpu(family)
    fast = GraphRunner(slow, StaticAttention(), graphs)
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    for present in STEPS:
        torch.testing.assert_close(two.step(present), one.step(present), atol=2e-3, rtol=0)
    if fast.failure:  # a mixture of experts may look at what it computes
        assert family not in DENSE, fast.failure
        pytest.skip(f"{family} cannot be captured: {fast.failure}")
    assert fast.replayed == len(STEPS)


def test_a_sequence_that_gave_its_blocks_away_goes_on_in_others() -> None:
    slow, layout = on_gpu("qwen2")
    fast = GraphRunner(slow, StaticAttention(), graphs)
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    for play in (one, two):
        for _ in range(2):
            play.step((0, 1, 2))
        play.tables[0], play.tables[3] = play.tables[3], play.tables[0]  # 3 is given 0's blocks
        for i in (3, 0):
            text = play.texts[i]
            play.runner.fill(play.pool, [Row(text[:-1], 0, play.tables[i])])
        for _ in range(4):
            play.step((0, 3, 1))
    assert two.texts == one.texts
    assert fast.replayed == 6


def test_what_cannot_be_captured_runs_uncaptured_and_the_gpu_goes_on() -> None:
    class Looking(StaticAttention):
        def kernel(self, batch: Batch, block_size: int) -> Kernel:
            assert int(batch.context_lengths[0]) >= 0  # the host waits for the device
            return super().kernel(batch, block_size)

    slow, layout = on_gpu("llama")
    fast = GraphRunner(slow, Looking(), graphs)
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    for present in STEPS:
        torch.testing.assert_close(two.step(present), one.step(present), atol=2e-3, rtol=0)
    assert fast.failure
    assert fast.replayed == 0
    again = GraphRunner(slow, StaticAttention(), graphs)  # nothing is left behind
    torch.testing.assert_close(trial(again, layout), trial(slow, layout), atol=2e-3, rtol=0)
    assert again.replayed


def test_a_model_that_is_booted_says_what_runs_it() -> None:
    engine = boot(resolve_model("demo"), device="cuda:0", dtype="auto", block_size=16)
    assert isinstance(engine.runner, GraphRunner), engine.runner.backend
    assert "CUDA graphs" in engine.runner.backend


@needs_flashinfer
@pytest.mark.filterwarnings("default")  # of a package that is not ours
@pytest.mark.parametrize(
    "peculiar",
    [{}, dict(sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=24)],
    ids=["grouped heads", "windows and softcaps"],
)
def test_flashinfer_gives_what_gathering_gives(peculiar: dict[str, Any]) -> None:
    runner, layout = in_torch(usual_heads(**peculiar), torch.bfloat16, 16)
    chosen = fastest(runner, layout, [("FlashInfer", lambda: with_flashinfer(runner, graphs))])
    assert isinstance(chosen, GraphRunner), chosen.backend
    assert "FlashInfer" in chosen.backend
    one, two = Play(runner, layout, LENGTHS), Play(chosen, layout, LENGTHS)
    for play in (one, two):  # chunks behind what is there, beside steps
        play.runner.fill(play.pool, [Row([1, 2, 3], 5, play.tables[4]), *play.rows((1,))])
    rows = [Row([5, 6], 8, two.tables[4], Logits.ALL), *two.rows((0, 2))]
    theirs = [Row([5, 6], 8, one.tables[4], Logits.ALL), *one.rows((0, 2))]
    found, expected = chosen.run(two.pool, rows), runner.run(one.pool, theirs)
    compare("it", "a mixed batch", found, expected, torch.bfloat16)


@needs_fp8
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_the_cards_fp8_product_is_the_dequantized_one(rows: int) -> None:
    torch.manual_seed(0)
    left, weight = torch.randn(rows, 256, device=GPU), torch.randn(96, 256, device=GPU)
    given = quantize(left), quantize(weight)
    found, expected = in_fp8(*given).float(), dequantized(*given)
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()  # bf16, and its adder


@needs_fp8
def test_a_model_in_fp8_is_captured_too() -> None:
    model = usual_heads()
    runner, layout = in_torch(model, torch.bfloat16, 16)
    with_fp8(runner, layout, in_fp8)
    fast = GraphRunner(runner, StaticAttention(), graphs)
    compare("it", "fp8", trial(fast, layout), trial(runner, layout), torch.bfloat16)
    assert fast.replayed
    forward, _ = on_cuda(
        usual_heads(), weights=torch.float8_e4m3fn, cache_dtype=torch.bfloat16, block_size=16
    )
    assert "fp8 weights" in forward.backend
