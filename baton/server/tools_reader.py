"""Tools reader: the text of an answer, told apart while it comes: content, and calls of tools. Pure.

    I will look.  <tool_call> {"name": "weather", "arguments": {"city": "Oslo"}} </tool_call>
    content                             name                   arguments

    reader = CallReader(format, names)          one for each answer
    reader.take(text) -> Heard(content, calls)  for each new piece of text, of any size
    reader.end()      -> Heard(content, calls)  after the last

Every way of cutting a text gives the same content and the same calls. A call's first piece has its name
and no arguments; the arguments follow as the model writes them, so joined they are JSON once the call is
complete. Another API surface maps the pieces to its own events: `index` counts the calls of an answer.

What only looks like a call is content: another name, another key, a mark that stops half-way. White space
around calls belongs to nothing; a line feed parts two contents. A call that the answer's end cuts off
before its name is known is left out.

What is held back is looked at again with every piece, so it has a bound. White space without one stands
in a list beside it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from baton.server.speech import begins_tag
from baton.server.unquoted import Unquoted
from baton.tool_calls import MOST_SPACE, CallFormat, Listing

JSON_SPACE = " \t\r\n"
SPACES, ANY_SPACES = re.compile(r"[ \t\r\n]*"), re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class CallPiece:
    """Of call number `index`: its name (in its first piece), or more of its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Heard:
    """What new text completes. `reasoning`: where the format of calls has it."""

    content: str = ""
    calls: tuple[CallPiece, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `arguments` is JSON if the answer was not cut off."""

    name: str
    arguments: str


class At(Enum):
    """Where in an answer a reader is."""

    FIRST = auto()  # before an answer that is a call or a text
    TEXT = auto()
    HEAD = auto()  # behind a mark
    ARGUMENTS = auto()
    REST = auto()  # of the object that the arguments stand in
    AFTER = auto()


class Verdict(Enum):
    """What held text is."""

    MORE = auto()  # it may become a call
    NONE = auto()


@dataclass(frozen=True, slots=True)
class _Head:
    """The beginning of a call, up to its arguments."""

    name: str
    length: int
    listed: bool


class CallReader:
    """The text of one answer, without its reasoning. `names`: of the tools that may be called. `forced`:
    the answer is calls and nothing else, so it never becomes content because it is cut off."""

    def __init__(self, form: CallFormat, names: Iterable[str], *, forced: bool = False) -> None:
        self._form = form
        self._names = {_quoted(each): each for each in names}
        self._forced = forced
        self._at = At.TEXT if form.opens else At.FIRST
        self._held = ""  # not told yet
        self._gap: list[str] = []  # white space before that, not told either
        self._mark = ""  # what made it look for a call: content after all if there is none
        self._listed = form.listing is Listing.ALWAYS
        self._nested = Nested()
        self._content = ""
        self._pieces: list[CallPiece] = []
        self._spoken = False  # some content has come
        self._behind_call = False  # none has come since
        self.calls = 0

    @property
    def complete(self) -> bool:
        """The answer does not end within a call."""
        return self._at in (At.FIRST, At.TEXT, At.AFTER)

    @property
    def held(self) -> int:
        """Characters that are looked at again with the next piece."""
        return len(self._held)

    def take(self, text: str) -> Heard:
        """New text. What it completes."""
        self._held += text
        steps = {
            At.FIRST: self._head, At.TEXT: self._text, At.HEAD: self._head,
            At.ARGUMENTS: self._arguments, At.REST: self._rest, At.AFTER: self._after,
        }  # fmt: skip
        while steps[self._at]():
            pass
        return self._told()

    def end(self) -> Heard:
        """The answer has ended. What was held back."""
        undecided = self._at in (At.FIRST, At.TEXT) and not self._forced
        left, self._held = self._with_gap(self._held), ""
        if undecided and (left.strip() or not self.calls):
            self._say(left)
        return self._told()

    def _told(self) -> Heard:
        found = Heard(self._content, tuple(self._pieces))
        self._content, self._pieces = "", []
        return found

    def _say(self, text: str) -> None:
        if self._behind_call and (text := text.lstrip()):
            text = f"\n{text}" if self._spoken else text
            self._behind_call = False
        self._spoken = self._spoken or bool(text)
        self._content += text

    # ---- steps: each is one in which the place changes, and says whether it does

    def _with_gap(self, text: str) -> str:
        """The text behind the white space before it."""
        text = "".join((*self._gap, text))
        self._gap = []
        return text

    def _text(self) -> bool:
        mark = self._form.opens
        at = self._held.find(mark) if mark else -1
        length = at if at >= 0 else len(self._held) - begins_tag(self._held, mark)
        whole, self._held = self._held[:length], self._held[length:]
        # white space before a mark, and at the end behind a call, belongs to nothing
        told = whole.rstrip() if mark or self.calls else whole
        if told:
            self._say(self._with_gap(told))
        if len(told) < len(whole):
            self._gap.append(whole[len(told) :])
        if at < 0:
            return False
        self._mark, self._held = self._with_gap(mark), self._held[len(mark) :]
        self._at = At.HEAD
        return True

    def _head(self) -> bool:
        """Also of an answer that may begin with a call: it has no mark."""
        first = self._at is At.FIRST
        if first:
            begun = self._held.lstrip()
            self._gap.append(self._held[: len(self._held) - len(begun)])
            self._held = begun
        found = self._found_head(first=first)
        if found is Verdict.MORE:
            return False
        if isinstance(found, _Head):
            self._gap = []
            self._begin(found)
        else:
            self._say(self._mark)
            self._at = At.TEXT
        return True

    def _begin(self, head: _Head) -> None:
        self._pieces.append(CallPiece(self.calls, head.name))
        self.calls += 1
        self._listed = self._listed or head.listed
        self._held = self._held[head.length :]
        self._nested = Nested()
        self._at = At.ARGUMENTS

    def _arguments(self) -> bool:
        length = self._nested.read(self._held)
        if length:
            self._pieces.append(CallPiece(self.calls - 1, arguments=self._held[:length]))
        self._held = self._held[length:]
        if self._nested.open:
            return False
        self._nested = Nested(within=True)
        self._at = At.REST
        return True

    def _rest(self) -> bool:
        self._held = self._held[self._nested.read(self._held) :]
        if self._nested.open:
            return False
        self._behind_call = True
        self._at = At.AFTER
        return True

    def _after(self) -> bool:
        form = self._form
        held = self._held = self._held.lstrip(JSON_SPACE)
        between = form.between if self._listed or form.listing is Listing.NEVER else ""
        ends = [each for each in (form.closes, "]" if self._listed else "") if each]
        if not held and (between or ends):
            return False
        for mark, place in [(between, At.HEAD), *((each, At.TEXT) for each in ends)]:
            if mark and held.startswith(mark):
                self._mark, self._held, self._at = mark, held[len(mark) :], place
                return True
            if mark.startswith(held):
                return False
        self._at = At.TEXT
        return True

    def _found_head(self, *, first: bool) -> _Head | Verdict:
        """The beginning of a call at the beginning of what is held."""
        form, text = self._form, self._held
        at: int | None = 0
        if first and form.before:
            if text.startswith(form.before):
                at = skipped(text, len(form.before), ANY_SPACES)
            elif form.before.startswith(text):
                return Verdict.MORE
        bracket: Sequence[Sequence[str]] = ()
        if first and form.listing is Listing.SEVERAL:
            bracket = (("[", ""),)
        elif not self._inside_list():
            bracket = (("[",),)
        parts = (
            *bracket, ("{",), ('"name"',), (":",), tuple(self._names), (",",),
            (_quoted(form.arguments),), (":",), ("{",),
        )  # fmt: skip
        chosen = []
        for options in parts:
            at = None if at is None else skipped(text, at)
            if at is None:
                return Verdict.NONE
            for option in options:
                if text.startswith(option, at):
                    break
                if option.startswith(text[at:]):
                    return Verdict.MORE
            else:
                return Verdict.NONE
            chosen.append(option)
            at += len(option)
        assert at is not None
        name = self._names[chosen[-5]]
        return _Head(name, at - 1, chosen[0] == "[")

    def _inside_list(self) -> bool:
        """A list has begun, or there is none."""
        always = self._form.listing is Listing.ALWAYS
        return not always or not self._mark.endswith(self._form.opens)


class Nested:
    """A JSON object, read once, piece by piece. `within`: it has begun before."""

    def __init__(self, *, within: bool = False) -> None:
        self._depth = int(within)
        self._brackets = Unquoted(r"[{}\[\]]")
        self.open = True

    @property
    def begun(self) -> bool:
        """Some of it has been read."""
        return self._depth > 0

    def read(self, text: str) -> int:
        """How many characters of the text are of it."""
        for each in self._brackets.found(text):
            self._depth += 1 if each[0] in "{[" else -1
            if not self._depth:
                self.open = False
                return each.end()
        return len(text)


def skipped(text: str, at: int, spaces: re.Pattern[str] = SPACES) -> int | None:
    """The place behind the white space; None if there is more than a call may have."""
    found = spaces.match(text, at)
    end = found.end() if found else at
    return None if end - at > MOST_SPACE else end


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def joined(pieces: Sequence[CallPiece]) -> tuple[Call, ...]:
    """The calls that these pieces are of, all from the first on."""
    names: list[str] = []
    texts: list[list[str]] = []
    for each in pieces:
        if each.name:
            names.append(each.name)
            texts.append([])
        texts[each.index].append(each.arguments)
    return tuple(map(Call, names, map("".join, texts)))
