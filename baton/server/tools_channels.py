"""Tools channels: reads answers that come in messages with headers (baton/tool_calls_channels.py). Pure.

    <|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant<|channel|>final<|message|>4
                                  reasoning                                                content

    reader = ChannelReader(names)     as CallReader; what it hears has reasoning, too

Each way of cutting a text gives the same. A line feed parts two messages of one kind. Text without a
header is content, and so is a message to somebody who is none of the request's tools. White space between
messages belongs to nothing. A header that the answer's end cuts off is left out.
"""

import re
from collections.abc import Callable, Iterable
from enum import Enum, auto

from baton.server.speech import begins_tag
from baton.server.tools_reader import CallPiece, Heard, Nested
from baton.tool_calls_channels import ADDRESS, CHANNEL, ENDS, MESSAGE, START

OVER = re.compile("|".join(map(re.escape, ENDS)))
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
SPOKEN = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
BEGINNINGS = (CHANNEL, START, f" {ADDRESS}")
MOST_HEADER = 512
"""Characters of a header, beside the longest name."""


class _At(Enum):
    BETWEEN = auto()
    HEADER = auto()
    SAYING = auto()
    ARGUMENTS = auto()  # that begin
    INSIDE = auto()  # an object
    RAW = auto()  # no object: up to the end of the message
    OVER = auto()  # behind the arguments


class _To(Enum):
    """Where a message goes."""

    REASONING = auto()
    CONTENT = auto()


class ChannelReader:
    """The text of one answer, with all its marks. `names`: of the tools that may be called. `begun`: it
    goes on with the content of a message. `reasons`: reasoning is told apart; else it is content."""

    def __init__(self, names: Iterable[str], *, begun: bool = False, reasons: bool = True) -> None:
        self._names = frozenset(names)
        self._longest = MOST_HEADER + max(map(len, self._names), default=0)
        self._reasons = reasons
        self._at = _At.SAYING if begun else _At.BETWEEN
        self._to = _To.CONTENT
        self._first = not begun  # nothing of this answer was read
        self._held = ""
        self._nested = Nested()
        self._said = dict.fromkeys(_To, False)  # some was told
        self._fresh = False  # nothing of this message was told
        self._texts: dict[_To, list[str]] = {each: [] for each in _To}
        self._pieces: list[CallPiece] = []
        self.calls = 0

    @property
    def complete(self) -> bool:
        """The answer does not end within a call."""
        return self._at not in (_At.HEADER, _At.ARGUMENTS, _At.INSIDE)

    @property
    def held(self) -> int:
        """Characters that are looked at again with the next piece."""
        return len(self._held)

    def take(self, text: str) -> Heard:
        """New text. What it completes."""
        self._held += text
        steps: dict[_At, Callable[[], bool]] = {
            _At.BETWEEN: self._between, _At.HEADER: self._header, _At.SAYING: self._saying,
            _At.ARGUMENTS: self._begin, _At.INSIDE: self._inside, _At.RAW: self._raw,
            _At.OVER: self._over,
        }  # fmt: skip
        while steps[self._at]():
            pass
        return self._told()

    def end(self) -> Heard:
        """The answer has ended. What was held back."""
        if self._at in (_At.BETWEEN, _At.SAYING):
            self._say(self._held)
        self._held = ""
        return self._told()

    def _told(self) -> Heard:
        reasoning, content = ("".join(self._texts[each]) for each in (_To.REASONING, _To.CONTENT))
        found = Heard(content, tuple(self._pieces), reasoning)
        self._texts, self._pieces = {each: [] for each in _To}, []
        return found

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._fresh and self._said[self._to]:
            self._texts[self._to].append("\n")
        self._fresh, self._said[self._to] = False, True
        self._texts[self._to].append(text)

    # ---- steps: each says whether there is another one to take

    def _between(self) -> bool:
        if not self._first:
            self._held = self._held.lstrip()
        if any(self._held.startswith(each) for each in BEGINNINGS):
            self._at = _At.HEADER
        elif any(each.startswith(self._held) for each in BEGINNINGS):
            return False
        else:
            self._speak(_To.CONTENT)
        self._first = False
        return True

    def _header(self) -> bool:
        at = self._held.find(MESSAGE)
        if at < 0 and len(self._held) <= self._longest:
            return False
        if at < 0 or at > self._longest:
            self._speak(_To.CONTENT)
            return True
        header, self._held = self._held[:at], self._held[at + len(MESSAGE) :]
        spoken, to = SPOKEN.search(header), RECIPIENT.search(header)
        address = f"to={to[1]}" if to else ""
        name = address.removeprefix(ADDRESS)
        if address.startswith(ADDRESS) and name in self._names:
            self._pieces.append(CallPiece(self.calls, name))
            self.calls += 1
            self._nested, self._at = Nested(), _At.ARGUMENTS
        else:
            thinks = self._reasons and spoken is not None and spoken[1] == "analysis"
            self._speak(_To.REASONING if thinks else _To.CONTENT)
        return True

    def _speak(self, to: _To) -> None:
        self._at, self._to, self._fresh = _At.SAYING, to, True

    def _up_to_end(self) -> tuple[str, bool]:
        """What comes of this message, and whether that is its end."""
        end = OVER.search(self._held)
        if end is None:
            length = len(self._held) - max(begins_tag(self._held, each) for each in ENDS)
            text, self._held = self._held[:length], self._held[length:]
            return text, False
        text, self._held = self._held[: end.start()], self._held[end.end() :]
        self._at = _At.BETWEEN
        return text, True

    def _saying(self) -> bool:
        text, ended = self._up_to_end()
        self._say(text)
        return ended

    def _argue(self, text: str) -> None:
        if text:
            self._pieces.append(CallPiece(self.calls - 1, arguments=text))

    def _begin(self) -> bool:
        self._held = self._held.lstrip()
        if any(each != self._held and each.startswith(self._held) for each in ENDS):
            return False
        if OVER.match(self._held):
            self._argue("{}")
        self._at = _At.INSIDE if self._held[0] == "{" else _At.RAW
        return True

    def _inside(self) -> bool:
        length = self._nested.read(self._held)
        self._argue(self._held[:length])
        self._held = self._held[length:]
        if self._nested.open:
            return False
        self._at = _At.OVER
        return True

    def _raw(self) -> bool:
        text, ended = self._up_to_end()
        self._argue(text)
        return ended

    def _over(self) -> bool:
        return self._up_to_end()[1]
