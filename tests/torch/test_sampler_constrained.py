"""Draws from what masks, forbidden ids, biases and penalties leave; and from logits they left alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampler.narrow import greedy, tied
from sampler.params import SamplingParams
from sampler.race import uniforms
from sampler.sample import (
    SamplingBatch,
    draw,
    filtered,
    finite_rows,
    sample,
    sample_finite,
)
from sampler.shape import NO, shaped
from tests.torch.test_sampler_shape import GREEDY, SHORT, Wish, batch_of, logits_for, wishes, words

NAN = float("nan")


@given(wishes, st.sampled_from([SHORT, 5000]), st.integers(0, 10**6))
def test_few_tokens_are_drawn_as_from_the_whole_vocabulary(
    chosen: list[Wish], vocab: int, seed: int
) -> None:
    """With masks that leave fewer than top_k, too."""
    logits, batch = logits_for(len(chosen), vocab, seed), batch_of(*chosen)
    scores = shaped(logits, batch.shape)
    wide = draw(filtered(scores, batch), batch.seed, batch.choice, batch.position)
    wide = torch.where(batch.greedy, scores.argmax(dim=-1), wide)
    tokens, finite = sample_finite(logits, batch)
    assert torch.equal(tokens[finite], wide[finite])


def test_fewer_allowed_than_top_k_is_no_tie() -> None:
    values = torch.tensor([[2.0, 1.0, NO, NO], [2.0, 1.0, 1.0, NO], [2.0, 1.0, 1.0, NO]])
    assert tied(values, torch.tensor([3, 2, 3])).tolist() == [False, True, False]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=50, top_p=0.9), GREEDY])
def test_what_is_not_allowed_is_never_drawn(params: SamplingParams) -> None:
    """Even where the model is all but sure of it."""
    rows = 500
    logits = logits_for(rows, 3000)
    logits[:, ::2] += 200
    mask = words([*range(0, 3000, 500), 7, 11, 2999], 94)
    batch = SamplingBatch.build(
        [params] * rows, range(rows), [()] * rows, "cpu",
        forbidden=[range(0, 3000, 2)] * rows, masks=[mask] * rows,
    )  # fmt: skip
    tokens, finite = sample_finite(logits, batch)
    assert finite.all()
    assert set(tokens.tolist()) == {7, 11, 2999}


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=5, top_p=0.9)])
def test_a_row_without_an_allowed_token_is_not_sound(params: SamplingParams) -> None:
    vocab = 700
    logits = logits_for(9, vocab)
    logits[3, :4] = NO
    logits[4, 600] = NAN
    logits[5, 600] = logits[8, 600] = math.inf
    tokens, finite = sample_finite(
        logits,
        batch_of(
            Wish(params),
            Wish(params, mask=b""),
            Wish(params, forbidden=range(vocab)),
            Wish(params, mask=words(range(4), 1)),  # what it allows the model excludes
            Wish(params, mask=words(range(4), 1)),  # a NaN is a NaN wherever it stands
            Wish(params, forbidden=[600]),
            Wish(params, mask=words([5], 1), forbidden=[5]),
            Wish(params, mask=words([5], 1)),
            Wish(params, mask=words([5], 1)),  # an infinity too, though masked away
        ),
    )
    assert finite.tolist() == [True, False, False, False, False, False, False, True, False]
    assert tokens[7] == 5
    assert tokens[0] == sample(logits[:1], batch_of(Wish(params)))[0]
    assert ((tokens >= 0) & (tokens < vocab)).all()


def test_a_batch_that_asks_for_nothing_takes_its_logits_as_they_are() -> None:
    params = [SamplingParams(), GREEDY]
    plain = SamplingBatch.build(params, [1, 2], [[1], [2]], "cpu")
    neutral = SamplingBatch.build(
        params, [1, 2], [[1], [2]], "cpu",
        generated=[[1], [2]], forbidden=[(), ()], masks=[None, None],
    )  # fmt: skip
    assert plain.shape is None
    assert neutral.shape is None
    logits = logits_for(2, 9)
    assert shaped(logits, None) is logits


def test_nothing_that_is_not_asked_for_changes_a_draw() -> None:
    """Tokens of the sampler before it knew masks, biases and penalties of presence and frequency."""
    mixture = [
        GREEDY,
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(seed=1),
        SamplingParams(seed=-5, temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=1.1),
        SamplingParams(seed=2, top_k=1000, top_p=0.99),
        SamplingParams(seed=3, top_p=0.9, choice=2),
        SamplingParams(seed=4, min_p=0.05, temperature=1.5),
        SamplingParams(seed=2**63 - 1, top_k=5),
    ]
    lanes = uniforms(torch.arange(32)[:, None], torch.tensor(0), torch.arange(3000))
    logits = (12 * lanes).float()
    batch = SamplingBatch.build(mixture * 4, range(32), [range(1000)] * 32, "cpu")
    tokens, finite = sample_finite(logits, batch)
    assert torch.equal(finite, finite_rows(logits))
    assert tokens.tolist() == [
        191, 1274, 1856, 2474, 884, 1556, 437, 571, 1342, 1233, 1516, 2214, 2298, 839, 1551, 2803,
        417, 1933, 1551, 2311, 1497, 2499, 1099, 277, 1642, 2209, 1586, 1903, 246, 2505, 1797, 874,
    ]  # fmt: skip


def test_a_batch_needs_one_entry_per_row_of_all_that_is_given() -> None:
    one = [SamplingParams()], [0], [()]
    with pytest.raises(ValueError, match=r"^generated must have one .*, got 2 entries for 1 rows$"):
        SamplingBatch.build(*one, "cpu", generated=[[], []])
    with pytest.raises(ValueError, match=r"^forbidden must .*, got 0 entries"):
        SamplingBatch.build(*one, "cpu", forbidden=[])
    with pytest.raises(ValueError, match=r"^masks must .*, got 3 entries"):
        SamplingBatch.build(*one, "cpu", masks=[None] * 3)
    for params in (SamplingParams(presence_penalty=1), SamplingParams(frequency_penalty=1)):
        with pytest.raises(ValueError, match=r"^generated must be given .* for row 1$"):
            SamplingBatch.build([GREEDY, params], [0, 0], [(), ()], "cpu")


def test_greedy_rows_that_nothing_shapes_need_no_batch() -> None:
    torch.manual_seed(3)
    for vocab in (7, 600, 50257):
        logits = torch.randn(5, vocab)
        logits[1, vocab // 2] = float("nan")
        logits[2] = float("-inf")
        logits[3, 3:5] = 99.0  # of equals the lowest
        params = [SamplingParams(temperature=0.0)] * 5
        assert all(each.plain for each in params)
        batch = SamplingBatch.build(params, [9] * 5, [[1]] * 5, logits.device)
        tokens, finite = sample_finite(logits, batch)
        assert finite.tolist() == [True, False, False, True, True]
        sound = zip(tokens.tolist(), finite.tolist(), strict=True)
        assert greedy(logits) == [token if good else None for token, good in sound]
        assert greedy(logits)[3] == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.5}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1}, {"logit_bias": ((3, 1.0),)}, {"allowed_token_ids": (3,)},
    ],
)  # fmt: skip
def test_what_is_drawn_or_shaped_is_not_plain(changed: dict[str, object]) -> None:
    assert not SamplingParams(**{"temperature": 0.0, **changed}).plain
