"""What FlashInfer is told about a batch, with a stand-in for the package that computes in torch what
its documentation promises. The package itself is run in tests/gpu."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from baton.engine.attention import AttentionParams
from baton.engine.cuda.graphs import Again, GraphRunner
from baton.engine.cuda.select import fastest, with_flashinfer
from baton.engine.runner import Runner
from tests.torch import pretend_flashinfer
from tests.torch.test_graphs import LENGTHS, STEPS, Play, plain

OURS = "baton.engine.cuda.flashinfer_attention"


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Our module over the stand-in; small heads and fp32 pass, so that parity is exact."""
    from importlib import import_module

    monkeypatch.setitem(sys.modules, "flashinfer", pretend_flashinfer)
    sys.modules.pop(OURS, None)
    module = import_module(OURS)
    monkeypatch.setattr(module, "HEAD_DIMS", (16, 24))
    monkeypatch.setattr(module, "DTYPES", (torch.float32,))
    yield module
    sys.modules.pop(OURS, None)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mistral", "gemma2"])
def test_it_gives_what_gathering_gives(attention: ModuleType, family: str) -> None:
    slow, layout = plain(family)
    fast = with_flashinfer(slow, Again)
    one, two = Play(slow, layout, LENGTHS), Play(fast, layout, LENGTHS)
    for present in STEPS:
        torch.testing.assert_close(two.step(present), one.step(present), atol=1e-4, rtol=0)
    rows, theirs = two.rows((0, 1)), one.rows((0, 1))
    torch.testing.assert_close(  # a mixed batch
        fast.plain.run(two.pool, rows), slow.run(one.pool, theirs), atol=1e-4, rtol=0
    )
    assert fast.replayed == len(STEPS)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_it_does_not_do_is_told_and_the_next_way_taken(
    attention: ModuleType, family: str
) -> None:
    slow, layout = plain(family)
    ways = [("FlashInfer", lambda: with_flashinfer(slow, Again))]
    chosen = fastest(Runner(slow.model), layout, ways)
    assert not isinstance(chosen, GraphRunner)
    why = {"gpt_oss": "attention sinks", "deepseek_v3": "keys of 24 and values of 12 numbers"}
    assert f"FlashInfer attention: layer 0 has {why[family]}" in chosen.backend


def test_what_runs_is_told(attention: ModuleType) -> None:
    slow, layout = plain("gemma2")
    chosen = fastest(slow, layout, [("FlashInfer", lambda: with_flashinfer(slow, Again))])
    assert chosen.backend == "in torch, FlashInfer 0.pretended, CUDA graphs"


@pytest.mark.parametrize(
    ("dtype", "key_dim", "value_dim", "sinks", "why"),
    [
        (torch.float32, 64, 64, None, "keys in torch.float32"),
        (torch.bfloat16, 80, 80, None, "heads of 80 numbers"),
        (torch.bfloat16, 128, 64, None, "keys of 128 and values of 64 numbers"),
        (torch.bfloat16, 64, 64, torch.zeros(4), "attention sinks"),
        (torch.float16, 256, 256, None, ""),
    ],
)
def test_each_reason_has_its_words(
    attention: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    sinks: torch.Tensor | None,
    why: str,
) -> None:
    monkeypatch.setattr(attention, "HEAD_DIMS", (64, 128, 256))
    monkeypatch.setattr(attention, "DTYPES", (torch.float16, torch.bfloat16))
    assert attention.unfit(dtype, key_dim, value_dim, AttentionParams(1.0, sinks=sinks)) == why


def test_pages_are_counted_from_tokens(attention: ModuleType) -> None:
    found = attention.pages([1, 4, 5, 9], torch.arange(7, dtype=torch.int32), 4)
    assert found.offsets.tolist() == [0, 1, 2, 4, 7]
    assert found.last.tolist() == [1, 4, 1, 1]
    assert {each.dtype for each in (found.offsets, found.blocks, found.last)} == {torch.int32}
