"""Server-sent events out of bytes, however they are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.upstream.events import LONGEST_EVENT, EventReader

STREAM = (
    b': keep-alive\n\ndata: {"a": "\xe6\x97\xa5"}\n\ndata:{"b": 2}\r\n\r\n'
    b'event: x\ndata: [1,\ndata: 2]\nid: 7\n\nerror: {"error": 3}\n\ndata: [DONE]\n\n'
)
EVENTS = ['{"a": "日"}', '{"b": 2}', "[1,\n2]", '{"error": 3}']


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_bytes_are_cut(cuts: list[int]) -> None:
    reader, found = EventReader(streamed=True), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(edges):
        found += reader.feed(STREAM[start:end])
    assert found + reader.end() == EVENTS


@given(st.integers(1, len(STREAM)))
def test_only_data_counts_as_data_however_it_is_cut(size: int) -> None:
    reader, before = EventReader(streamed=True), 0
    for start in range(0, len(STREAM), size):
        reader.feed(STREAM[start : start + size])
        assert reader.data >= before
        before = reader.data
    assert reader.data == len('{"a": "日"}{"b": 2}[1,2]{"error": 3}[DONE]')


@pytest.mark.parametrize(
    "more",
    [b": keep-alive\n\n", b":", b"\n", b"\r\n", b"event: ping\n\n", b"id: 7\n", b"data:\n\n"],
)
def test_what_keeps_a_connection_open_is_no_data(more: bytes) -> None:
    reader = EventReader(streamed=True)
    reader.feed(b"data: 1\n\n")
    for _ in range(3):
        assert reader.feed(more) == []
        assert reader.data == 1


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@given(st.integers(1, 20))
def test_lines_end_in_any_of_three_ways(end: bytes, size: int) -> None:
    stream = b"\xef\xbb\xbf" + b"data: 1|data: 2||: ping||data: 3||".replace(b"|", end)
    reader, found = EventReader(streamed=True), []
    for start in range(0, len(stream), size):
        found += reader.feed(stream[start : start + size])
    assert found + reader.end() == ["1\n2", "3"]


def test_an_event_without_a_blank_line_at_the_end() -> None:
    reader = EventReader(streamed=True)
    assert reader.feed(b'data: {"a": 1}') == []
    assert reader.end() == ['{"a": 1}']


def test_a_reply_that_is_not_streamed_is_one_event() -> None:
    reader = EventReader(streamed=False)
    assert reader.feed(b'{"a":\n\n') + reader.feed(b" 1}") == []
    assert reader.end() == ['{"a":\n\n 1}']
    assert EventReader(streamed=False).end() == []


def test_nor_are_spaces_of_a_reply_that_is_not_streamed() -> None:
    reader = EventReader(streamed=False)
    counts = []
    for part in (b" ", b"\n", b'{"a":', b" ", b" 1}", b"\n"):
        reader.feed(part)
        counts.append(reader.data)
    assert counts == [0, 0, 5, 5, 9, 9]


@pytest.mark.parametrize("streamed", [True, False])
def test_an_endless_event_is_refused(streamed: bool) -> None:
    reader = EventReader(streamed=streamed)
    assert reader.feed(b"data: " + b"x" * (LONGEST_EVENT // 2)) == []
    with pytest.raises(ValueError, match="bytes"):
        reader.feed(b"x" * LONGEST_EVENT)


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        EventReader(streamed=True).feed(b"data: \xff\n\n")
