"""Windows over a long text: every token once, with enough before it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.evaluation.perplexity import spans_of
from tools.evaluation.windows import windows

SIZES = st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w)))


@given(st.integers(0, 80), SIZES)
def test_every_token_but_the_first_is_scored_exactly_once(
    tokens: int, sizes: tuple[int, int]
) -> None:
    window, stride = sizes
    cut = list(windows(tokens, window=window, stride=stride))
    assert [i for w in cut for i in range(w.start, w.end)] == list(range(1, tokens))


@given(st.integers(2, 80), SIZES)
def test_a_token_has_enough_before_it_and_a_window_is_never_exceeded(
    tokens: int, sizes: tuple[int, int]
) -> None:
    window, stride = sizes
    for at, each in enumerate(windows(tokens, window=window, stride=stride)):
        assert each.end - each.begin - 1 <= window
        assert each.start - each.begin >= (1 if at == 0 else window - stride + 1)


@given(st.integers(2, 80), st.integers(1, 12))
def test_windows_whose_stride_is_their_length_read_no_token_twice(tokens: int, window: int) -> None:
    cut = list(windows(tokens, window=window, stride=window))
    read = [i for w in cut for i in range(w.begin, w.end - 1)]
    assert read == list(range(tokens - 1))


def test_the_picture_of_the_docstring() -> None:
    cut = [(w.begin, w.start, w.end) for w in windows(8, window=4, stride=2)]
    assert cut == [(0, 1, 5), (2, 5, 7), (4, 7, 8)]


def test_a_span_is_the_window_of_the_ids() -> None:
    spans = list(spans_of([10, 11, 12, 13], window=2, stride=1))
    assert [(span.token_ids, span.start) for span in spans] == [
        ((10, 11, 12), 1),
        ((11, 12, 13), 2),
    ]


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride must be 1 to the window"):
        list(windows(9, window=4, stride=stride))
