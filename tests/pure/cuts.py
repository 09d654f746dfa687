"""Readers of calls, given a text in pieces: together they say what is said of the whole."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def check_cuts(reader: Any, whole: Any, text: str, cuts: Sequence[int]) -> None:
    """`whole`: what the text says when it is read at once. A call's name comes before its arguments."""
    places = sorted({0, *(each for each in cuts if each < len(text)), len(text)})
    found = [*(reader.take(text[a:b]) for a, b in pairwise(places)), reader.end()]
    pieces = [piece for each in found for piece in each.calls]
    assert "".join(each.content for each in found) == whole.content
    assert [each.name for each in pieces if each.name] == [each.name for each in whole.calls]
    for index, call in enumerate(whole.calls):
        own = [each for each in pieces if each.index == index]
        assert (own[0].name, own[0].arguments) == (call.name, "")
        assert "".join(each.arguments for each in own) == call.arguments
        assert all(each.arguments and not each.name for each in own[1:])
    assert reader.complete == whole.complete
