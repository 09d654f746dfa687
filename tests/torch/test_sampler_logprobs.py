"""Log-probabilities come from the raw logits, and the ways of asking agree."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sampler import logprobs
from sampler.logprobs import Chosen, logprobs_of, report


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


def test_a_row_has_the_same_logprobs_alone_and_in_a_batch() -> None:
    logits = torch.randn(32, 1001)
    ids = logits.argmax(dim=-1)
    together = report(logits, ids, [3] * 32)
    for row in range(32):
        alone = report(logits[row : row + 1], ids[row : row + 1], [3])
        assert alone == [together[row]]


def test_every_token_can_be_asked_for() -> None:
    (answer,) = report(torch.randn(1, 7), torch.tensor([0]), [7])
    assert answer is not None
    assert sum(math.exp(value) for _, value in answer.top) == pytest.approx(1)


def by_hand(row: list[float], token: int, count: int) -> Chosen | None:
    """report() for one row, in Python's own floats."""
    if count == -1:
        return None
    most = max(row)
    total = most + math.log(sum(math.exp(logit - most) for logit in row))
    likeliest = sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]
    return Chosen(row[token] - total, tuple((each, row[each] - total) for each in likeliest))


def same(got: Chosen | None, expected: Chosen | None) -> None:
    if got is None or expected is None:
        assert got is expected
        return
    assert [token for token, _ in got.top] == [token for token, _ in expected.top]
    assert [got.logprob, *(value for _, value in got.top)] == pytest.approx(
        [expected.logprob, *(value for _, value in expected.top)], rel=1e-5, abs=1e-5
    )


@given(st.data())
def test_a_report_says_what_was_asked_for_alone_and_in_a_batch(data: st.DataObject) -> None:
    """Against plain Python: ordinary logits, many equals, tokens that the model itself excludes."""
    vocab = data.draw(st.sampled_from([1, 2, 40, 700]))
    counts = data.draw(st.lists(st.sampled_from([-1, 0, 1, 5, 20, 1000]), max_size=5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = 3 * torch.randn(len(counts), vocab, generator=generator)
    if data.draw(st.booleans()):
        logits = logits.round()
        logits[:, 1::3] = -math.inf
    ids = torch.randint(0, vocab, (len(counts),), generator=generator)
    answers = report(logits, ids, counts)
    assert len(answers) == len(counts)
    for row, answer in enumerate(answers):
        same(answer, by_hand(logits[row].tolist(), int(ids[row]), counts[row]))
        assert report(logits[row : row + 1], ids[row : row + 1], counts[row : row + 1]) == [answer]


def test_a_report_has_the_bits_of_the_other_ways_and_plain_values() -> None:
    logits = torch.randn(4, 3000).bfloat16()
    ids = torch.tensor([5, 6, 7, 8])
    answers = [answer for answer in report(logits, ids, [3] * 4) if answer]
    assert [answer.logprob for answer in answers] == logprobs_of(logits, ids).tolist()
    for answer in answers:
        alike = torch.tensor([id_ for id_, _ in answer.top])
        row = logits[answers.index(answer)].expand(len(alike), -1)
        assert [value for _, value in answer.top] == logprobs_of(row, alike).tolist()
    assert {type(each) for answer in answers for each in answer.top[0]} == {int, float}
    assert type(answers[0].logprob) is float


def test_what_a_greedy_row_draws_is_its_likeliest() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 321::321] = 4.0  # the lowest of many equals
    (answer,) = report(logits, logits.argmax(dim=-1), [1])
    assert answer is not None
    assert answer.top == ((321, answer.logprob),)


def test_rows_that_ask_for_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []
    whole = Tensor.log_softmax

    def counted(self: Tensor, dim: int) -> Tensor:
        worked.append(len(self))
        return whole(self, dim)

    monkeypatch.setattr(Tensor, "log_softmax", counted)
    monkeypatch.setattr(
        logprobs, "largest", lambda *_: pytest.fail("no row asks for the most likely tokens")
    )
    logits, ids = torch.randn(4, 30), torch.tensor([1, 2, 3, 4])
    assert report(logits, ids, [-1] * 4) == [None] * 4
    assert worked == []
    answers = report(logits, ids, [-1, 0, -1, 0])
    assert worked == [2]
    assert [answer and answer.top for answer in answers] == [None, (), None, ()]


def test_a_report_needs_one_entry_per_row_and_counts_from_minus_one() -> None:
    logits, ids = torch.zeros(2, 7), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="2, 2 and 1"):
        report(logits, ids, [1])
    with pytest.raises(ValueError, match="at least -1, got -2"):
        report(logits, ids, [1, -2])
    assert report(logits[:0], ids[:0], []) == []
