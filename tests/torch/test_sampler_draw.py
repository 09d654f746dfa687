"""The draw: fair, repeatable, and blind to everything but its own row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sampler.narrow import likeliest
from sampler.params import SamplingParams
from sampler.race import splitmix64, uniforms
from sampler.sample import (
    SamplingBatch,
    draw,
    filtered,
    finite_rows,
    sample,
    sample_finite,
)
from tests.depth import deep

NAN, INF = float("nan"), float("inf")
MIXTURE = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(seed=1),
    SamplingParams(seed=-5, temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=1.1),
    SamplingParams(seed=2, top_k=1000, top_p=0.99),
    SamplingParams(seed=3, top_p=0.9, choice=2),
    SamplingParams(seed=4, min_p=0.05, temperature=1.5),
    SamplingParams(seed=2**63 - 1, top_k=5),
]


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def tokens(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
    """Every row has seen tokens 0 to 9."""
    batch = SamplingBatch.build(params, positions, [range(10)] * len(params), "cpu")
    return sample(logits, batch).tolist()


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """How far counts are from what is expected, in standard deviations of a fair draw's."""
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


def counters(n: int) -> Tensor:
    return torch.arange(n)


def test_splitmix64_gives_the_published_numbers() -> None:
    gamma, got, state = 0x9E3779B97F4A7C15, [], 1234567
    for _ in range(5):
        signed = state - 2**64 if state >= 2**63 else state
        got.append(splitmix64(torch.tensor([signed])).item() % 2**64)
        state = (state + gamma) % 2**64
    assert got == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("varied", [0, 1, 2, 3], ids=["seed", "choice", "position", "lane"])
def test_uniforms_are_uniform_and_uncorrelated_along_every_counter(varied: int) -> None:
    n = 200_000
    words = [torch.tensor(11)] * 4
    words[varied] = counters(n)
    u = uniforms(*words)
    assert u.dtype == torch.float64
    assert 0 < u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u, bins=1000, min=0, max=1)
    assert abs(chi_square(counts, torch.full((1000,), n / 1000))) < 4
    for lag in (1, 2, 7, 256):
        pair = torch.stack([u[:-lag], u[lag:]])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / n**0.5


def test_pairs_of_consecutive_positions_fill_the_square_evenly() -> None:
    u = uniforms(torch.tensor(0), torch.tensor(0), counters(400_000))
    cells = (u[0::2] * 20).long() * 20 + (u[1::2] * 20).long()
    counts = torch.bincount(cells, minlength=400).double()
    assert abs(chi_square(counts, torch.full((400,), 500.0))) < 4


def test_every_counter_counts() -> None:
    one = torch.tensor([0, 1, 0, 0, 0, -1]), torch.tensor([0, 0, 1, 0, 0, 0])
    two = torch.tensor([0, 0, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 0])
    assert len(set(uniforms(*one, *two).tolist())) == 6


def test_uniforms_are_blind_to_the_batch_and_to_torchs_own_generator() -> None:
    words = torch.randint(-(2**62), 2**62, (3, 50))
    together = uniforms(*words)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    alone = torch.cat([uniforms(*words[:, i : i + 1]) for i in range(50)])
    assert torch.equal(together, alone)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("vocab", [2, 40, 256, 300, 1000])
def test_tokens_are_drawn_as_often_as_softmax_says(vocab: int) -> None:
    n = 20_000
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    scores[1] = scores.max() + 1
    zeros = torch.zeros(n, dtype=torch.int64)
    drawn = draw(scores.expand(n, vocab), zeros + 5, zeros, counters(n))
    counts = torch.bincount(drawn, minlength=vocab).double()
    expected = scores.double().softmax(-1) * n
    often = expected >= 5  # the rest is one bucket: chi-square wants no rare ones
    rest = torch.stack([counts[~often].sum(), expected[~often].sum().clamp(min=1e-9)])
    counts, expected = torch.stack([counts, expected])[:, often]
    if rest[1] >= 5:
        counts, expected = torch.cat([counts, rest[:1]]), torch.cat([expected, rest[1:]])
    assert abs(chi_square(counts, expected)) < 4


def test_a_filtered_token_is_never_drawn() -> None:
    scores = torch.zeros(5000, 600)
    scores[:, torch.arange(600) % 7 != 3] = -INF
    zeros = torch.zeros(5000, dtype=torch.int64)
    drawn = draw(scores, zeros, zeros, counters(5000))
    assert (drawn % 7 == 3).all()
    assert len(drawn.unique()) == len(range(3, 600, 7))


@pytest.mark.parametrize("vocab", [700, 2049])
def test_a_row_draws_the_same_alone_and_in_any_batch(vocab: int) -> None:
    """Rows of every kind: alone, in batches of 32, and in another order."""
    noise = torch.Generator().manual_seed(vocab)
    rows = 256  # 32 of each kind
    logits = torch.randn(rows, vocab, generator=noise) * 3
    params = [MIXTURE[row % len(MIXTURE)] for row in range(rows)]
    positions = list(range(rows))
    alone = [
        tokens(logits[row : row + 1], [params[row]], [positions[row]])[0] for row in range(rows)
    ]
    order = torch.randperm(rows, generator=noise).tolist()
    for sequence in (list(range(rows)), order):
        for start in range(0, rows, 32):
            some = sequence[start : start + 32]
            got = tokens(logits[some], [params[i] for i in some], [positions[i] for i in some])
            assert got == [alone[i] for i in some]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(MIXTURE), min_size=1, max_size=8), st.integers(0, 2**62))
def test_a_draw_depends_on_seed_choice_and_position_alone(
    neighbours: list[SamplingParams], position: int
) -> None:
    logits = torch.randn(len(neighbours) + 1, 500, generator=torch.Generator().manual_seed(0))
    me = SamplingParams(seed=77, choice=1, top_p=0.95)
    got = tokens(logits, [*neighbours, me], [*range(len(neighbours)), position])
    assert got[-1] == tokens(logits[-1:], [me], [position])[0]


def test_other_seeds_choices_and_positions_draw_other_tokens() -> None:
    logits = torch.zeros(1, 50_000)
    params = [SamplingParams(), SamplingParams(seed=1), SamplingParams(choice=1), SamplingParams()]
    drawn = tokens(logits.expand(4, -1), params, [0, 0, 0, 1])
    assert len(set(drawn)) == 4


def test_noise_in_the_last_bits_of_the_logits_changes_no_draw() -> None:
    """The reason for races; an inverse cumulative sum changes several of these."""
    noise = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, 20_000, generator=noise) * 2).expand(1000, -1)
    nudged = logits + torch.randn(1000, 20_000, generator=noise) * 1e-5
    zeros = torch.zeros(1000, dtype=torch.int64)
    first, second = (draw(x, zeros, zeros, counters(1000)) for x in (logits, nudged))
    assert torch.equal(first, second)


def test_greedy_takes_the_lowest_id_among_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    assert tokens(logits, [SamplingParams(temperature=0)] * 2, [0, 0]) == [1, 0]


def test_greedy_sees_the_repetition_penalty() -> None:
    logits = torch.zeros(2, 20)
    logits[:, 4], logits[:, 15] = 2.0, 1.9  # every row has seen 0 to 9
    plain, penalised = SamplingParams(temperature=0), MIXTURE[1]
    assert tokens(logits, [plain, penalised], [0, 0]) == [4, 15]


def test_filters_of_greedy_rows_cost_nothing() -> None:
    params = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1)
    batch = SamplingBatch.build([params], [0], [[1]], "cpu")
    assert batch.all_greedy
    assert batch.shape is None
    assert (batch.active, batch.largest) == ((), {})


def test_half_precision_logits_are_sampled_as_float32() -> None:
    logits = torch.randn(8, 700).bfloat16()
    assert tokens(logits, MIXTURE, [3] * 8) == tokens(logits.float(), MIXTURE, [3] * 8)


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(8, 700)
    before = logits.clone()
    tokens(logits, MIXTURE, list(range(8)))
    assert torch.equal(logits, before)


def test_an_empty_batch_is_sampled_to_nothing() -> None:
    assert tokens(torch.zeros(0, 10), [], []) == []


def test_a_batch_needs_one_entry_per_row() -> None:
    with pytest.raises(ValueError, match="1, 2 and 1"):
        SamplingBatch.build([SamplingParams()], [0, 1], [[]], "cpu")


def test_rows_that_cannot_be_sampled_are_told_apart() -> None:
    rows = torch.tensor([[1, 2], [1, NAN], [NAN, NAN], [1, INF], [-INF, 1], [-INF, -INF]])
    assert finite_rows(rows).tolist() == [True, False, False, False, True, False]
    assert finite_rows(rows.half()).tolist() == finite_rows(rows).tolist()


def test_an_unhealthy_row_gives_some_token_and_harms_no_neighbour() -> None:
    logits = torch.randn(8, 700)
    healthy = tokens(logits, MIXTURE, [1] * 8)
    for bad in (NAN, INF, -INF):
        broken = logits.clone()
        broken[::2] = bad
        got = tokens(broken, MIXTURE, [1] * 8)
        assert got[1::2] == healthy[1::2]
        assert all(0 <= token < 700 for token in got)


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 511, 512, 513, 1000, 50257])
def test_the_likeliest_is_what_max_says(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    scores = torch.randint(0, 40, (50, vocab), generator=generator).float()  # many equals
    scores[3] = float("-inf")
    scores[4, vocab // 2] = float("inf")
    highest, ids = likeliest(scores)
    assert torch.equal(highest, scores.amax(dim=-1))
    assert torch.equal(ids, scores.argmax(dim=-1))
    scores[5, -1] = float("nan")
    highest, ids = likeliest(scores)
    assert highest[5].isnan()
    assert torch.equal(ids[6:], scores[6:].argmax(dim=-1))


def test_one_look_tells_token_and_soundness() -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = float("-inf")
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature)] * 6
        batch = SamplingBatch.build(params, [9] * 6, [()] * 6, "cpu")
        tokens, finite = sample_finite(logits, batch)
        assert torch.equal(finite, finite_rows(logits))
        assert finite.tolist() == [True, False, False, False, True, True]
        assert torch.equal(tokens[finite], sample(logits, batch)[finite])


@given(st.data())
@settings(max_examples=deep(80, usual=40))
def test_few_tokens_are_drawn_as_from_the_whole_vocabulary(data: st.DataObject) -> None:
    """Every filter, ties at the edge of top_k, neighbours of other kinds."""
    vocab = data.draw(st.sampled_from([3, 40, 700, 5000]))
    rows = data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    equals = data.draw(st.booleans())  # of those at the edge of top_p either way may keep any
    logits = logits.round() if equals else logits
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([0, 1, 2, 7, 50, 600])),
            top_p=1.0 if equals else data.draw(st.sampled_from([0.05, 0.5, 0.95, 1.0])),
            min_p=data.draw(st.sampled_from([0.0, 0.1])),
            seed=data.draw(st.integers(0, 99)),
        )
        for _ in range(rows)
    ]
    batch = SamplingBatch.build(params, list(range(rows)), [()] * rows, "cpu")
    wide = draw(filtered(logits, batch), batch.seed, batch.choice, batch.position)
    wide = torch.where(batch.greedy, logits.argmax(dim=-1), wide)
    assert torch.equal(sample(logits, batch), wide)
