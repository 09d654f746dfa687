"""Masks, forbidden ids, biases and penalties: each against another's arithmetic, and all together."""

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import llguidance
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from sampler.params import SamplingParams
from sampler.sample import SamplingBatch, sample, sample_finite
from sampler.shape import NO, shaped

PLAIN, GREEDY = SamplingParams(), SamplingParams(temperature=0)


@dataclass(frozen=True, slots=True)
class Wish:
    """One row's share of SamplingBatch.build."""

    params: SamplingParams = PLAIN
    seen: Collection[int] = ()
    generated: Sequence[int] = ()
    forbidden: Collection[int] = ()
    mask: bytes | None = None
    position: int = field(default=0, kw_only=True)


def batch_of(*wishes: Wish) -> SamplingBatch:
    return SamplingBatch.build(
        [wish.params for wish in wishes],
        [wish.position for wish in wishes],
        [wish.seen for wish in wishes],
        "cpu",
        generated=[wish.generated for wish in wishes],
        forbidden=[wish.forbidden for wish in wishes],
        masks=[wish.mask for wish in wishes],
    )


def words(allowed: Collection[int], count: int) -> bytes:
    """A mask of `count` little-endian 32-bit words."""
    return struct.pack(
        f"<{count}I",
        *(sum(1 << (i % 32) for i in allowed if i // 32 == word) for word in range(count)),
    )


def allows(mask: bytes, token: int) -> bool:
    if token // 32 >= len(mask) // 4:
        return False
    (word,) = struct.unpack_from("<I", mask, 4 * (token // 32))
    return bool(word >> (token % 32) & 1)


def shaped_by_hand(row: list[float], wish: Wish) -> list[float]:
    """The definition, in Python's own floats."""
    p, result = wish.params, []
    bias = dict(p.logit_bias)
    for token, logit in enumerate(row):
        listed = p.allowed_token_ids is None or token in p.allowed_token_ids
        masked = wish.mask is not None and not allows(wish.mask, token)
        if not listed or masked or token in wish.forbidden:
            result.append(NO)
            continue
        logit += bias.get(token, 0.0)
        if p.repetition_penalty != 1 and token in wish.seen:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        count = list(wish.generated).count(token)
        result.append(logit - count * p.frequency_penalty - (count > 0) * p.presence_penalty)
    return result


def logits_for(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [1, 8, 31, 32, 33, 300])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 40])
def test_a_mask_allows_the_ids_of_its_bits_and_none_past_its_end(vocab: int, count: int) -> None:
    logits = logits_for(4, vocab)
    noise = torch.Generator().manual_seed(count)
    masks = [
        words({i for i in range(32 * count) if torch.rand(1, generator=noise) < 0.5}, count),
        None,
        words(range(32 * count), count),
        words((), 1),  # of another length than its neighbours'
    ]
    got = shaped(logits, batch_of(*(Wish(mask=mask) for mask in masks)).shape)
    for row, mask in enumerate(masks):
        for token in range(vocab):
            kept = mask is None or allows(mask, token)
            assert got[row, token] == (logits[row, token] if kept else NO)


def test_a_mask_is_read_as_llguidance_writes_it() -> None:
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_regex("[bdz]")
    )
    mask = matcher.compute_bitmask()
    got = shaped(torch.zeros(1, 300), batch_of(Wish(mask=mask)).shape)
    assert (got[0] == 0).nonzero()[:, 0].tolist() == [ord(letter) for letter in "bdz"]


def test_of_a_row_that_lists_its_ids_these_stay_and_no_other() -> None:
    logits, params = logits_for(3, 50), SamplingParams(allowed_token_ids=(3, 49, 50, 2**31 - 1))
    got = shaped(logits, batch_of(Wish(), Wish(params), Wish(params, mask=words([3], 1))).shape)
    assert torch.equal(got[0], logits[0])
    assert (got[1] > NO).nonzero()[:, 0].tolist() == [3, 49]
    assert torch.equal(got[1, [3, 49]], logits[1, [3, 49]])
    assert (got[2] > NO).nonzero()[:, 0].tolist() == [3]  # what the mask allows, too


def test_forbidden_ids_equal_transformers() -> None:
    logits, ids = logits_for(2, 50), [3, 49, 7, 3]
    theirs = SuppressTokensLogitsProcessor(ids)(torch.zeros(2, 0), logits.clone())
    got = shaped(logits, batch_of(Wish(), Wish(forbidden=[*ids, 50, 2**31])).shape)
    assert torch.equal(got, torch.stack([logits[0], theirs[1]]))


def test_logit_bias_equals_transformers() -> None:
    logits, bias = logits_for(2, 50), {3: 5.5, 49: -100.0, 0: 1e-3}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    theirs = processor(torch.zeros(2, 0, dtype=torch.int64), logits.clone())
    params = SamplingParams(logit_bias=(*bias.items(), (50, 1.0), (2**31 - 1, 1.0)))
    got = shaped(logits, batch_of(Wish(), Wish(params)).shape)
    assert torch.equal(got, torch.stack([logits[0], theirs[1]]))


def test_presence_counts_once_and_frequency_each_time() -> None:
    generated = [4, 4, 9, 4, 99]  # 99: past the vocabulary
    logits = torch.zeros(4, 20)
    got = shaped(
        logits,
        batch_of(
            Wish(SamplingParams(presence_penalty=0.5), generated=generated),
            Wish(SamplingParams(frequency_penalty=0.25), generated=generated),
            Wish(SamplingParams(presence_penalty=-2, frequency_penalty=1.5), generated=generated),
            Wish(SamplingParams(presence_penalty=2)),
        ).shape,
    )
    assert got[:, 4].tolist() == [-0.5, -0.75, -2.5, 0]
    assert got[:, 9].tolist() == [-0.5, -0.25, 0.5, 0]
    assert got.count_nonzero() == 6


def test_the_prompt_is_no_matter_of_presence_and_frequency() -> None:
    params = SamplingParams(presence_penalty=2, frequency_penalty=2)
    logits = logits_for(1, 20)
    assert torch.equal(shaped(logits, batch_of(Wish(params, seen=range(20))).shape), logits)


def test_each_step_works_on_what_the_step_before_left() -> None:
    """8 + 2 = 10, / 2 = 5, - 1 = 4. Any two steps swapped give another number; -100 bans nothing."""
    params = SamplingParams(
        logit_bias=((1, 2.0), (2, -100.0), (3, 100.0)),
        repetition_penalty=2,
        presence_penalty=0.25,
        frequency_penalty=0.375,
        allowed_token_ids=(0, 1, 2, 3, 4),
    )
    wish = Wish(params, seen=[1], generated=[1, 1], forbidden=[3], mask=words([0, 1, 2, 3, 5], 1))
    got = shaped(torch.tensor([[8.0, 8.0, 8.0, 8.0, 8.0, 8.0]]), batch_of(wish).shape)
    assert got.tolist() == [[8.0, 4.0, -92.0, NO, NO, NO]]


SHORT = 70  # a vocabulary in which everything collides
ids = st.lists(st.integers(0, SHORT + 5), max_size=8)
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -2.0, 0.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.1, -0.2]),
    logit_bias=st.dictionaries(
        st.integers(0, SHORT + 5), st.sampled_from([-100.0, -1.5, 0.0, 3.0]), max_size=4
    ).map(lambda chosen: tuple(chosen.items())),
    allowed_token_ids=st.none()
    | st.none()
    | st.lists(st.integers(0, SHORT + 5), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
masks = st.none() | st.builds(words, st.sets(st.integers(0, SHORT), max_size=12), st.integers(0, 4))
wishes = st.lists(
    st.builds(
        Wish, some_params, ids, ids, st.just([]) | ids, masks, position=st.integers(0, 10**6)
    ),
    min_size=1,
    max_size=6,
)


@given(wishes, st.integers(0, 10**6))
def test_a_row_is_shaped_by_its_own_wish_alone(chosen: list[Wish], seed: int) -> None:
    """Against plain Python, and bit for bit against the row alone."""
    logits = logits_for(len(chosen), SHORT, seed)
    batch = batch_of(*chosen)
    got = shaped(logits, batch.shape)
    tokens, finite = sample_finite(logits, batch)
    assert torch.equal(sample(logits, batch), tokens)
    for row, wish in enumerate(chosen):
        expected = shaped_by_hand(logits[row].tolist(), wish)
        assert got[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        single = logits[row : row + 1]
        alone = batch_of(wish)
        assert torch.equal(shaped(single, alone.shape)[0], got[row])
        token, sound = sample_finite(single, alone)
        assert sound[0] == finite[row] == (max(expected) > NO)
        if not sound[0]:
            continue
        assert token[0] == tokens[row]
        assert expected[int(token[0])] > NO
        if wish.params.greedy:
            assert expected[int(token[0])] == pytest.approx(max(expected), rel=1e-5, abs=1e-5)


def test_shaping_leaves_the_logits_as_they_were_and_works_in_float32() -> None:
    params = SamplingParams(
        allowed_token_ids=tuple(range(15)),
        logit_bias=((1, 0.1),),
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.1,
    )
    wish = Wish(params, range(9), [1, 1, 2], [5], words(range(20), 1))
    logits = logits_for(2, 33).bfloat16()
    before = logits.clone()
    for chosen in ((wish, wish), (wish, Wish())):  # of all rows and of some
        shape = batch_of(*chosen).shape
        assert torch.equal(shaped(logits, shape), shaped(logits.float(), shape))
        whole = logits.float()
        shaped(whole, shape)
        assert torch.equal(whole, before.float())
    assert torch.equal(logits, before)
