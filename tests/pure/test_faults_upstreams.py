"""tools.faults.upstreams: what is asked, and when a server is ended."""

import pytest

from tools.faults.ledger import Chunk, End, Event
from tools.faults.upstreams import MIDDLE, bodies, in_the_middle, seeded

BEGUN: list[Event] = [Chunk("a-0", 0.0, "word ") for _ in range(MIDDLE)]


def test_half_are_streams_and_both_kinds_are_sampled_now_and_then() -> None:
    asked = bodies(16, 20)
    assert [body["stream"] for body in asked.values()] == [True, False] * 8
    sampled = [case for case in asked if seeded(case)]
    assert [asked[case]["stream"] for case in sampled] == [True, False] * 2
    assert all((asked[case]["temperature"] > 0) == (case in sampled) for case in asked)
    assert len({body["prompt"] for body in asked.values()}) == 16


@pytest.mark.parametrize(
    ("events", "streams"),
    [
        ([], 0),
        (BEGUN[1:], 0),
        (BEGUN, 1),
        ([*BEGUN, *(Chunk("a-1", 0.0, "word ") for _ in range(MIDDLE))], 2),
        ([*BEGUN, Chunk("a-0", 0.0, "", "length")], 0),
        ([*BEGUN, End("a-0", 0.0, "error")], 0),
        ([Chunk("a-0", 0.0, "a whole answer", "stop"), End("a-0", 0.0, "done")], 0),
    ],
)
def test_a_stream_is_in_the_middle_from_some_parts_on_until_its_end(
    events: list[Event], streams: int
) -> None:
    assert in_the_middle(events) == streams
