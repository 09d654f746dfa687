"""The narrow way of sampling draws what the full way draws, for every filter and all of them together."""

import itertools
from collections.abc import Iterable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sampler import sample as s
from sampler.filters import FILTERS, Filter, Narrow
from sampler.params import RULES, SamplingParams

NOT_FILTERS = {
    "temperature",
    "seed",
    "choice",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
}
VALUES: dict[str, list[float]] = {
    "top_k": [1, 7, 40, 500, 600],
    "top_p": [0.3, 0.9, 0.99],
    "min_p": [0.02, 0.3],
}
"""Values to try of each filter: a new filter needs its own here."""


def full(logits: Tensor, batch: s.SamplingBatch) -> Tensor:
    return s.draw(s.filtered(logits, batch), batch.seed, batch.choice, batch.position)


def batch_of(params: list[SamplingParams]) -> s.SamplingBatch:
    return s.SamplingBatch.build(params, range(len(params)), [()] * len(params), "cpu")


def logits_of(rows: int, vocab: int, seed: int, deviation: float = 4.0) -> Tensor:
    return deviation * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def test_every_number_of_the_parameters_is_a_filter_or_known_to_be_none() -> None:
    assert {each.name for each in FILTERS} == RULES.keys() - NOT_FILTERS
    assert RULES.keys() <= {field.name for field in fields(SamplingParams)}


def test_a_filter_says_what_it_does_in_the_narrow_way() -> None:
    with pytest.raises(TypeError, match="narrow"):
        Filter("min_p", off=0, keep=lambda scores, values, largest: scores)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="SamplingParams has no number typical"):
        Filter("typical", off=0, keep=lambda scores, *_: scores, narrow=Narrow.SAME)


def test_filters_are_off_by_default_and_in_an_order_that_the_narrow_way_can_follow() -> None:
    neutral = SamplingParams()
    assert all(getattr(neutral, each.name) == each.off for each in FILTERS)
    built_in = [each.narrow is Narrow.BUILT_IN for each in FILTERS]
    assert built_in == sorted(built_in, reverse=True)
    assert [each.name for each in FILTERS if each.narrow is Narrow.BUILT_IN] == [
        "top_k",
        "top_p",
        "min_p",
    ]


def combinations() -> Iterable[tuple[Filter, ...]]:
    for count in range(len(FILTERS) + 1):
        yield from itertools.combinations(FILTERS, count)


@pytest.mark.parametrize(
    "chosen", list(combinations()), ids=lambda c: "+".join(f.name for f in c) or "none"
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_each_combination_of_filters_draws_the_full_ways_tokens(
    chosen: tuple[Filter, ...], data: st.DataObject
) -> None:
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.5, 1.0, 1.4])),
            seed=data.draw(st.integers(0, 99)),
            **{each.name: data.draw(st.sampled_from(VALUES[each.name])) for each in chosen},  # type: ignore[arg-type]
        )
        for _ in range(4)
    ]
    vocab = data.draw(st.sampled_from([300, 600, 3001]))
    logits = logits_of(len(params), vocab, data.draw(st.integers(0, 10**6)))
    ties_decide = {"top_k", "top_p"} <= {each.name for each in chosen}  # which equals stay is open
    if not ties_decide and data.draw(st.booleans()):
        logits = logits.bfloat16().float()
    batch = batch_of(params)
    assert torch.equal(s.sample(logits, batch), full(logits, batch))


def without_the_likeliest(scores: Tensor, values: Tensor, _: float) -> Tensor:
    """A filter for the test below: where it is on, the likeliest token goes if another is left."""
    second = scores.topk(2, dim=-1).values[:, 1:]
    top = scores == scores.amax(dim=-1, keepdim=True)
    return scores.masked_fill(top & (values[:, None] > 0) & (second > -torch.inf), -torch.inf)


def with_one_more(batch: s.SamplingBatch, on: Tensor, narrow: Narrow) -> s.SamplingBatch:
    """The batch with a filter more, under a name of its own."""
    more = Filter("presence_penalty", off=0, keep=without_the_likeliest, narrow=narrow)
    values = {**batch.values, more.name: on}
    largest = {**batch.largest, more.name: 1.0}
    given, active = {**batch.given, more.name: tuple(on.tolist())}, (*batch.active, more)
    ways = s.arranged(batch.greedy.tolist(), given, active)
    return replace(batch, active=active, values=values, largest=largest, given=given, ways=ways)


@pytest.mark.parametrize("narrow", [Narrow.SAME, Narrow.NEVER])
def test_a_new_filter_is_applied_whatever_way_a_row_takes(narrow: Narrow) -> None:
    kinds = [
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 900},
        {},
        {"temperature": 0.0},
    ]
    params = [SamplingParams(**kind, seed=seed) for seed in range(8) for kind in kinds]  # type: ignore[arg-type]
    logits, plain = logits_of(len(params), 4000, 5), batch_of(params)
    on = torch.tensor([1.0, 1.0, 0.0] * (len(params) // 3), dtype=torch.float64)
    batch = with_one_more(plain, on, narrow)
    tokens, drawn = s.sample(logits, batch), ~plain.greedy
    assert torch.equal(tokens[drawn], full(logits, batch)[drawn])
    assert not (tokens == logits.argmax(dim=-1))[drawn & (on > 0)].any()
    untouched = ~drawn | (on == 0)
    assert torch.equal(tokens[untouched], s.sample(logits, plain)[untouched])
