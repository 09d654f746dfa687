"""Log-probabilities come from the raw logits, and the two ways of asking agree."""

import pytest
import torch

from sampler.logprobs import logprobs_of, top_logprobs


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def test_a_logprob_is_the_log_of_softmax() -> None:
    logits = torch.randn(6, 300) * 4
    ids = torch.randint(0, 300, (6,))
    expected = logits.double().softmax(-1).log().gather(1, ids[:, None])[:, 0]
    got = logprobs_of(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_likeliest_come_first_with_the_same_bits() -> None:
    logits = torch.randn(6, 300).bfloat16()
    values, ids = top_logprobs(logits, 5)
    assert values.shape == ids.shape == (6, 5)
    assert torch.equal(values, values.sort(-1, descending=True).values)
    assert torch.equal(logits.gather(1, ids), logits.topk(5).values)
    for place in range(5):
        assert torch.equal(logprobs_of(logits, ids[:, place]), values[:, place])


def test_a_row_has_the_same_logprobs_alone_and_in_a_batch() -> None:
    logits = torch.randn(32, 1001)
    together = top_logprobs(logits, 3)
    for row in range(32):
        alone = top_logprobs(logits[row : row + 1], 3)
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])


def test_none_at_all_and_every_token_can_be_asked_for() -> None:
    logits = torch.randn(2, 7)
    assert top_logprobs(logits, 0)[0].shape == (2, 0)
    assert top_logprobs(logits, 7)[0].exp().sum(-1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("count", [-1, 8])
def test_a_count_outside_the_vocabulary_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be in .*, got {count}"):
        top_logprobs(torch.zeros(2, 7), count)
