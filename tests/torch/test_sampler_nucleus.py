"""Rows that top_p or min_p leaves few tokens: drawn from those alone, and the same tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sampler import sample as s
from sampler.filters import FEW
from sampler.narrow import largest, nucleus_few, total_weight
from sampler.params import SamplingParams
from tests.depth import deep

NAN, INF = float("nan"), float("inf")
CHAT = SamplingParams(temperature=0.6, top_p=0.9, seed=4)


def batch_of(params: list[SamplingParams]) -> s.SamplingBatch:
    """Row i at position 7 * i."""
    return s.SamplingBatch.build(params, range(0, 7 * len(params), 7), [()] * len(params), "cpu")


def peaked(rows: int, vocab: int, seed: int = 0, deviation: float = 4.0) -> Tensor:
    return deviation * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def wide(logits: Tensor, batch: s.SamplingBatch) -> Tensor:
    """What is drawn from the whole vocabulary."""
    drawn = s.draw(s.filtered(logits, batch), batch.seed, batch.choice, batch.position)
    return torch.where(batch.greedy, logits.argmax(dim=-1), drawn)


def narrow(logits: Tensor, batch: s.SamplingBatch) -> tuple[Tensor, Tensor]:
    """bool [rows, vocab]: what the narrow way keeps; bool [rows]: where it is sure."""
    values, ids = largest(logits, FEW)
    values = s.apply_temperature(values, batch.temperature)
    total = total_weight(s.apply_temperature(logits, batch.temperature), values[:, 0])
    kept, sure = nucleus_few(values, total, batch.values["top_p"], batch.values["min_p"])
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, kept > -INF), sure


@settings(max_examples=deep(100, usual=40), deadline=None)
@given(st.data())
def test_a_sure_row_keeps_and_draws_what_the_wide_way_does(data: st.DataObject) -> None:
    seed, vocab = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([600, 3001, 9000]))
    logits = peaked(4, vocab, seed, data.draw(st.sampled_from([2.0, 4.0, 8.0])))
    if data.draw(st.booleans()):
        logits = logits.bfloat16().float()  # many equals
    params = [
        SamplingParams(
            temperature=data.draw(st.floats(0.3, 1.5)),
            top_p=data.draw(st.one_of(st.floats(0.1, 0.999), st.just(1.0))),
            min_p=data.draw(st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0])),
            seed=seed,
        )
        for _ in range(4)
    ]
    batch = batch_of(params)
    kept, sure = narrow(logits, batch)
    assert torch.equal(kept[sure], (s.filtered(logits, batch) > -INF)[sure])
    assert torch.equal(s.sample(logits, batch), wide(logits, batch))


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0])
def test_peaked_rows_are_sure_and_keep_what_transformers_keeps(temperature: float) -> None:
    logits = peaked(12, 50257, deviation=5.0)
    kept, sure = narrow(logits, batch_of([SamplingParams(temperature=temperature, top_p=0.9)] * 12))
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(0.9)])
    theirs = chain(torch.zeros(12, 0, dtype=torch.int64), logits.clone()) > -INF
    assert sure.sum() >= 10
    assert torch.equal(kept[sure], theirs[sure])


def test_min_p_alone_leaves_few_as_well() -> None:
    logits = peaked(12, 5000)
    kept, sure = narrow(logits, batch_of([SamplingParams(min_p=0.05)] * 12))
    theirs = MinPLogitsWarper(0.05)(torch.zeros(12, 0, dtype=torch.int64), logits.clone()) > -INF
    assert sure.all()
    assert torch.equal(kept, theirs)


@pytest.mark.parametrize(
    ("top_p", "kept", "sure"), [(0.7, 2, True), (0.8, 3, True), (0.75, 2, False)]
)
def test_a_row_is_not_sure_if_a_sum_lies_on_the_edge(top_p: float, kept: int, sure: bool) -> None:
    """Of 1/2, 1/4, 1/8 ... the first two are 3/4."""
    logits = -torch.arange(700.0)[None] * torch.tensor(2.0).log()
    keeps, knows = narrow(logits, batch_of([SamplingParams(top_p=top_p)]))
    assert knows.item() is sure
    if sure:
        assert keeps.sum() == kept


def test_rows_that_leave_many_are_not_sure() -> None:
    logits = torch.stack([torch.zeros(3000), 0.1 * peaked(1, 3000)[0]])
    for params in (CHAT, SamplingParams(min_p=0.1), SamplingParams(top_p=0.999, min_p=0.01)):
        assert not narrow(logits, batch_of([params] * 2))[1].any()
        batch = batch_of([params] * 2)
        assert torch.equal(s.sample(logits, batch), wide(logits, batch))


def test_equals_at_the_edge_are_left_to_the_wide_way() -> None:
    logits = torch.full((2, 2000), -30.0)
    logits[:, :1000:100] = 1.0  # ten equals: 9 of them make 0.9
    logits[1, :1000:100] = torch.linspace(1.0, 1.2, 10)
    batch = batch_of([SamplingParams(top_p=0.83)] * 2)
    assert narrow(logits, batch)[1].tolist() == [False, True]
    assert torch.equal(s.sample(logits, batch), wide(logits, batch))


def test_equals_that_all_stay_or_all_go_leave_a_row_sure() -> None:
    logits = torch.full((1, 2000), -30.0)
    logits[:, :1000:100] = 1.0
    kept, sure = narrow(logits, batch_of([SamplingParams(top_p=0.95, min_p=0.1)]))
    assert sure.all()
    assert kept.sum() == 10


MIXTURE = [
    SamplingParams(temperature=0),
    CHAT,
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, seed=1),
    SamplingParams(seed=2),
    SamplingParams(temperature=1.5, top_p=0.99, seed=3),
    SamplingParams(top_k=900, top_p=0.9, seed=5),
    SamplingParams(min_p=0.1, seed=6),
]


def test_a_batch_of_all_kinds_draws_the_wide_ways_tokens() -> None:
    params = MIXTURE * 6
    logits, batch = peaked(len(params), 4000), batch_of(params)
    before = logits.clone()
    assert torch.equal(s.sample(logits, batch), wide(logits, batch))
    assert torch.equal(logits, before)


def test_neighbours_change_neither_way_nor_token() -> None:
    logits = peaked(40, 4000, deviation=3.0)
    logits[::5] *= 0.1
    batch = batch_of([CHAT] * 40)
    tokens, sure = s._draw_nucleus(logits, batch)
    assert 0 < sure.sum() < 40
    for row in range(40):
        alone = s._draw_nucleus(logits[row : row + 1], batch.of([row], torch.tensor([row])))
        assert alone[1] == sure[row]
        assert alone[0] == tokens[row]


@pytest.mark.parametrize("left", [1, 5, 300])
def test_rows_with_few_ids_allowed_are_sure(left: int) -> None:
    logits = peaked(6, 3000)
    logits[:, torch.randperm(3000, generator=torch.Generator().manual_seed(1))[left:]] = -INF
    batch = batch_of([CHAT] * 6)
    kept, sure = narrow(logits, batch)
    assert sure.any()
    assert torch.equal(kept[sure], (s.filtered(logits, batch) > -INF)[sure])
    assert torch.equal(s.sample(logits, batch), wide(logits, batch))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_unsound_row_is_not_sure_and_harms_no_neighbour(bad: float) -> None:
    logits, batch = peaked(4, 3000), batch_of([CHAT] * 4)
    sound = s.sample(logits, batch)
    logits[1, 2000] = bad
    logits[2] = bad
    tokens, finite = s.sample_finite(logits, batch)
    assert finite.tolist() == [True, bad == -INF, False, True]
    assert torch.equal(tokens[[0, 3]], sound[[0, 3]])
    assert torch.equal(tokens, wide(logits, batch))
    assert not s._draw_nucleus(logits, batch)[1][2]


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 530])
def test_vocabularies_of_any_size(vocab: int) -> None:
    logits, batch = peaked(8, vocab), batch_of([CHAT] * 8)
    assert torch.equal(s.sample(logits, batch), wide(logits, batch))
