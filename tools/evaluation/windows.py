"""Windows: a text longer than a model's context, cut so that every token is scored exactly once.

    window 4, stride 2     t0 t1 t2 t3 t4 t5 t6 t7
    first window           r  rs rs rs  s                  r: the model reads it
    second                        r  r  r  rs  s           s: it is scored by this window
    third                                r  r  r  s

A window reads `window` tokens and scores those after its first that no window before has scored, the
last of them read by nobody. So the first scores up to `window` tokens, every other one `stride`, with
at least window - stride + 1 tokens before each. With stride = window no token is read twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens begin .. end - 2 are read, start .. end - 1 are scored."""

    begin: int
    start: int
    end: int


def windows(tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """Of a text of so many tokens. Token 0 is given, not scored, so one token has no window."""
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be 1 to the window ({window}), got {stride}")
    begin, start = 0, 1
    while start < tokens:
        end = min(tokens, begin + window + 1)
        yield Window(begin, start, end)
        begin, start = begin + stride, end
