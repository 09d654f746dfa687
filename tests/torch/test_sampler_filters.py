"""Each step of the sampler equals transformers' own processor, bit for bit, on the same logits."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerationMixin

from sampler import filters
from sampler import sample as s
from sampler.params import SamplingParams
from sampler.shape import apply_repetition_penalty, shaped

NO = float("-inf")
NONE_SEEN = torch.zeros(1, 0, dtype=torch.int64)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def kinds_of_rows(vocab: int) -> Tensor:
    """float32 [10, vocab]: ordinary rows, ties, extremes, filtered and flat ones."""
    noise = torch.Generator().manual_seed(vocab)
    rows = torch.randn(10, vocab, generator=noise) * 3
    rows[2] = rows[2].round()  # ties everywhere
    rows[3] = 0.0
    rows[4] *= 1e6
    rows[5, 1:] = NO  # one token left
    rows[6, ::2] = NO
    rows[7] = rows[7].bfloat16().float()
    rows[8] -= 1e4
    rows[9, 0] = 1e30
    return rows


def by_transformers(processor: LogitsProcessor, row: Tensor) -> Tensor:
    return processor(NONE_SEEN, row[None].clone())[0]


def column(value: float, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), value, dtype=torch.float64)


@pytest.mark.parametrize("vocab", [1, 2, 33, 300])
@pytest.mark.parametrize("value", [1e-5, 0.1, 0.7, 1.0, 1.3, 2.0])
def test_temperature_equals_transformers(vocab: int, value: float) -> None:
    rows = kinds_of_rows(vocab)
    ours = s.apply_temperature(rows, column(value, rows))
    for row, got in zip(rows, ours, strict=True):
        assert torch.equal(got, by_transformers(TemperatureLogitsWarper(value), row))


@pytest.mark.parametrize("vocab", [1, 2, 33, 700])
@pytest.mark.parametrize("value", [1, 2, 7, 50, 1000])
def test_top_k_equals_transformers(vocab: int, value: int) -> None:
    rows = kinds_of_rows(vocab)
    ours = filters.keep_top_k(rows, torch.full((len(rows),), value), value)
    for row, got in zip(rows, ours, strict=True):
        assert torch.equal(got, by_transformers(TopKLogitsWarper(value), row))


@pytest.mark.parametrize("vocab", [1, 2, 33, 512, 1500])
@pytest.mark.parametrize("value", [1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9])
def test_top_p_equals_transformers(vocab: int, value: float) -> None:
    rows = kinds_of_rows(vocab)
    ours = filters.keep_top_p(rows, column(value, rows))
    for row, got in zip(rows, ours, strict=True):
        assert torch.equal(got, by_transformers(TopPLogitsWarper(value), row))


@pytest.mark.parametrize("vocab", [1, 2, 33, 700])
@pytest.mark.parametrize("value", [0.0, 1e-9, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(vocab: int, value: float) -> None:
    rows = kinds_of_rows(vocab)
    ours = filters.keep_min_p(rows, column(value, rows))
    for row, got in zip(rows, ours, strict=True):
        assert torch.equal(got, by_transformers(MinPLogitsWarper(value), row))


@pytest.mark.parametrize("value", [0.5, 1.0, 1.05, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(value: float) -> None:
    rows = kinds_of_rows(33)
    seen = [[row, 3, 3, 7, 40] for row in range(len(rows))]  # 40: past the vocabulary
    pairs = torch.tensor([[row, token] for row, ids in enumerate(seen) for token in ids]).T
    ours = apply_repetition_penalty(rows, pairs, column(value, rows))
    theirs = RepetitionPenaltyLogitsProcessor(value)(torch.tensor(seen), rows.clone())
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [0.1, 0.5, 0.9, 0.999])
def test_the_narrow_way_through_top_p_keeps_what_the_wide_way_keeps(value: float) -> None:
    rows = filters.keep_top_k(torch.randn(40, 3000) * 3, torch.full((40,), 300), 300)
    assert ((rows > NO).sum(-1) <= filters.FEW).all()
    wide = filters.keep_nucleus(rows, column(value, rows), 3000)
    assert torch.equal(filters.keep_top_p(rows, column(value, rows)), wide)


def test_the_narrow_way_keeps_the_same_values_when_tokens_tie() -> None:
    rows = filters.keep_top_k(torch.randn(40, 3000).round(), torch.full((40,), 5), 5)
    narrow = filters.keep_nucleus(rows, column(0.6, rows), filters.FEW)
    wide = filters.keep_nucleus(rows, column(0.6, rows), 3000)
    assert torch.equal(narrow.sort(-1).values, wide.sort(-1).values)


def test_rows_with_a_filter_off_are_left_alone() -> None:
    rows = kinds_of_rows(700)
    off, on = torch.zeros(10, dtype=torch.int64), torch.tensor([0, 3] * 5)
    assert torch.equal(filters.keep_top_p(rows, column(1.0, rows)), rows)
    assert torch.equal(filters.keep_min_p(rows, column(0.0, rows)), rows)
    assert torch.equal(filters.keep_top_k(rows, off, 1), rows)
    assert torch.equal(filters.keep_top_k(rows, on, 3)[::2], rows[::2])


@pytest.mark.parametrize(
    "step",
    [
        lambda x: apply_repetition_penalty(x, torch.tensor([[0, 1], [2, 3]]), column(2.0, x)),
        lambda x: s.apply_temperature(x, column(0.5, x)),
        lambda x: filters.keep_top_k(x, torch.full((len(x),), 2), 2),
        lambda x: filters.keep_top_p(x, column(0.5, x)),
        lambda x: filters.keep_min_p(x, column(0.5, x)),
    ],
)
def test_no_step_changes_its_input(step: Callable[[Tensor], Tensor]) -> None:
    rows = kinds_of_rows(33)
    before = rows.clone()
    step(rows)
    assert torch.equal(rows, before)


def chain_of_transformers(params: SamplingParams) -> LogitsProcessorList:
    """The processors `generate` would run, in its order: built by GenerationMixin itself."""
    config = GenerationConfig(
        do_sample=True,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
    )
    model = GenerationMixin()
    model.config = type("Config", (), {"is_encoder_decoder": False})()
    return model._get_logits_processor(config, input_ids_seq_length=4)


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(some_params, min_size=1, max_size=6), st.integers(0, 10_000))
def test_the_whole_chain_equals_transformers(chosen: list[SamplingParams], seed: int) -> None:
    """One batch, a different set of parameters per row, each row against a chain of its own."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(chosen), 400, generator=noise) * 3
    seen = torch.randint(0, 400, (len(chosen), 30), generator=noise).tolist()
    batch = s.SamplingBatch.build(chosen, [0] * len(chosen), seen, "cpu")
    ours = s.filtered(shaped(logits, batch.shape), batch)
    for row, params in enumerate(chosen):
        ids = torch.tensor([seen[row]])
        theirs = chain_of_transformers(params)(ids, logits[row : row + 1].clone())[0]
        assert torch.equal(ours[row], theirs)
