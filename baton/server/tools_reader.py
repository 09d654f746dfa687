"""Tools reader: the text of an answer, told apart while it comes: content, and calls of tools. Pure.

    I will look.  <tool_call> {"name": "weather", "arguments": {"city": "Oslo"}} </tool_call>
    content                             name                   arguments

    reader = CallReader(format, names)          one for each answer
    reader.take(text) -> Heard(content, calls)  for each new piece of text, of any size
    reader.end()      -> Heard(content, calls)  after the last
    heard(text, format, names) -> Answer        of a whole answer

Every way of cutting a text gives the same content and the same calls. A call's first piece has its name and
no arguments; the arguments follow as the model writes them, so joined they are JSON once the call is complete.
Another API surface maps the pieces to its own events: `index` counts the calls of an answer.

What only looks like a call is content: another name, another key, a mark that stops half-way. White space
around calls belongs to nothing. A call that the answer's end cuts off before its name is known is left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from baton.tool_calls import CallFormat


@dataclass(frozen=True, slots=True)
class CallPiece:
    """Of call number `index`: its name (in its first piece), or more of its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Heard:
    """What new text completes."""

    content: str = ""
    calls: tuple[CallPiece, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `arguments` is JSON if the answer was not cut off."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole one."""

    content: str
    calls: tuple[Call, ...]
    complete: bool  # it does not end within a call
