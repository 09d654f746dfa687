"""Patterns: regular expressions that a model's or an adapter's files bring, compiled if they match in
good time.

re tries every way in which a pattern can match a name. There are more than can be tried where a repeat
stands in another, as in (a+)+, where branches of a repeated choice begin alike, as in (a|ab)*, and where
many repeats follow one another. Such patterns are refused: the start would hang.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

LONGEST = 500
"""Characters of a pattern."""
MOST = 1000
"""Patterns of a file."""
LOOSE = 3
"""Repeats that may directly follow another one, without a letter between them."""
REPEATS = 6
"""Repeats in a pattern, or in one of its branches."""
NESTED = "has a repeat inside a repeat"
parser: Any = import_module("re._parser")  # it has no public name


class OddPattern(ValueError):
    """Why a pattern is not used, as the end of a sentence that begins with it."""


def compiled(text: str) -> re.Pattern[str]:
    """Raises OddPattern."""
    if len(text) > LONGEST:
        raise OddPattern(f"has {len(text):,} characters (at most {LONGEST} are read)")
    try:
        found = re.compile(text)
        tree = parser.parse(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise OddPattern("is no regular expression") from error
    state = _State()
    _walk(tree, state, in_repeat=False)
    if state.loose > LOOSE or state.repeats > REPEATS:
        raise OddPattern("has too many repeats, so matching may not end")
    return found


class _State:
    """What has been met on the way through a pattern, in its worst branch."""

    def __init__(self, repeats: int = 0, loose: int = 0, *, after: bool = False) -> None:
        self.repeats, self.loose = repeats, loose
        self.after = after  # a repeat, and no letter since

    def copy(self) -> "_State":
        return _State(self.repeats, self.loose, after=self.after)

    def meet_repeat(self) -> None:
        self.repeats += 1
        self.loose += self.after
        self.after = True

    def join(self, branches: list["_State"]) -> None:
        self.repeats = max(each.repeats for each in branches)
        self.loose = max(each.loose for each in branches)
        self.after = any(each.after for each in branches)


def _walk(tree: Any, state: _State, *, in_repeat: bool) -> None:
    for operation, value in tree:
        kind = str(operation)
        if kind.endswith("_REPEAT"):
            least, most, inner = value
            varies, loops = least != most, int(most) > 1
            if varies and in_repeat:
                raise OddPattern(f"{NESTED}, so matching may not end")
            if varies:
                state.meet_repeat()
            _walk(inner, state, in_repeat=in_repeat or loops)
        elif kind == "BRANCH":
            if not _begin_apart(value[1]):
                if in_repeat:
                    raise OddPattern(
                        "repeats a choice whose branches may begin alike, so matching may not end"
                    )
                state.meet_repeat()  # it is tried in several ways, as a repeat is
            ends = [state.copy() for _ in value[1]]
            for branch, end in zip(value[1], ends, strict=True):
                _walk(branch, end, in_repeat=in_repeat)
            state.join(ends)
        elif kind == "LITERAL":
            state.after = False
        else:
            for inner in _inside(value):
                _walk(inner, state, in_repeat=in_repeat)


def _inside(value: Any) -> Iterator[Any]:
    """The patterns inside of an operation: of a group, or of what looks ahead."""
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _inside(each)


def _begin_apart(branches: list[Any]) -> bool:
    """Whether each branch begins with a letter of its own, in whatever case."""
    firsts: list[Any] = [branch[0] for branch in branches if len(branch)]
    letters = {chr(code).casefold() for kind, code in firsts if str(kind) == "LITERAL"}
    return len(letters) == len(branches)
