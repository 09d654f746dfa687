"""`bench serve` counts a stream as an answer only if it ended well."""

import pytest

from tools.benchmarks.serve import questions_of
from tools.benchmarks.streams import tokens_of

PIECE = b'data: {"choices":[{"index":0,"text":" a","finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":24}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_a_stream_that_ended_well_says_how_many_tokens_it_had() -> None:
    assert tokens_of(PIECE + END + USAGE + DONE) == 24


@pytest.mark.parametrize(
    "stream",
    [
        PIECE + USAGE + DONE,  # no finish_reason
        PIECE + END + USAGE,  # cut before its end
        PIECE + END + DONE,  # no usage
        PIECE + b'data: {"error":{"code":"worker_lost"}}\n\n' + DONE,
        b"",
    ],
)
def test_any_other_is_an_error(stream: bytes) -> None:
    with pytest.raises(ValueError, match="stream"):
        tokens_of(stream)


def test_answers_are_as_long_as_was_asked_and_vary_as_much() -> None:
    lengths = [each.new for each in questions_of(400, 3, 100, 0.5)]
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150
    assert {each.new for each in questions_of(5, 3, 100, 0)} == {100}
    assert questions_of(5, 3, 100, 0.5) == questions_of(5, 3, 100, 0.5)
