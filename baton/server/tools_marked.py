"""Tools marked: reads calls whose name stands outside of JSON (baton/tool_calls_marked.py). Pure.

    <tool_call><function=weather><parameter=city>\\nOslo\\n</parameter></function></tool_call>
                         name      {"city":         "Oslo"             }

The arguments come out as JSON, while they are written: a text gets its quotes, JSON stays as it is. What
a value is follows from the parameter's schema, as in the grammar.
"""

import json
import re
from collections.abc import Iterable, Mapping

from baton import finite
from baton.server.speech import begins_tag
from baton.server.tools_reader import At, CallPiece, CallReader, Nested, Verdict
from baton.tool_calls import CallFormat
from baton.tool_calls_marked import NAME, Kind, Literals, Marks, Parameters

SPACE = " \t\r\n"
NUMBER = re.compile(r":\d{1,3}")
ANY_PARAMETERS = Parameters({})


def reader_of(
    form: CallFormat,
    names: Iterable[str],
    parameters: Mapping[str, Parameters] | None = None,
    *,
    forced: bool = False,
) -> CallReader:
    """Of one answer. `parameters`: of the tools, for formats in which they stand one by one."""
    if form.marked is None:
        return CallReader(form, names, forced=forced)
    return MarkedReader(form, form.marked, names, parameters or {}, forced=forced)


class MarkedReader(CallReader):
    """As CallReader."""

    def __init__(
        self,
        form: CallFormat,
        marks: Marks,
        names: Iterable[str],
        parameters: Mapping[str, Parameters],
        *,
        forced: bool = False,
    ) -> None:
        self._tools = frozenset(names)
        super().__init__(form, self._tools, forced=forced)
        self._marks, self._parameters = marks, parameters
        self._tool = ANY_PARAMETERS
        self._values = 0  # parameters of this call so far
        self._value: _Value | None = None

    # ---- steps

    def _head(self) -> bool:
        found = self._name()
        if found is Verdict.MORE:
            return False
        if isinstance(found, Verdict):
            self._say(self._mark)
            self._at = At.TEXT
            return True
        name, length = found
        self._pieces.append(CallPiece(self.calls, name))
        self.calls += 1
        self._held = self._held[length:]
        self._tool, self._values, self._value = self._parameters.get(name, ANY_PARAMETERS), 0, None
        self._nested = Nested()
        self._at = At.ARGUMENTS
        return True

    def _name(self) -> tuple[str, int] | Verdict:
        """The name, and how long the call is up to its arguments."""
        marks, text = self._marks, self._held
        at = _match(marks.begins, text, 0)
        if isinstance(at, Verdict):
            return at
        at = at if marks.begins else _skipped(text, 0)
        name = NAME.match(text, at)
        end = name.end() if name else at
        if end == len(text):
            return Verdict.MORE
        if name is None or name[0] not in self._tools:
            return Verdict.NONE
        if marks.numbered:
            number = NUMBER.match(text, end)
            if number is None or number.end() == len(text):
                return (
                    Verdict.MORE
                    if text[end:] in (":", number[0] if number else ":")
                    else Verdict.NONE
                )
            end = number.end()
        after = _match(marks.named, text, end)
        if isinstance(after, Verdict):
            return after
        parameter = marks.parameter
        options = ("{",) if parameter is None else (parameter.opens, marks.ends[0])
        verdicts = [_match((each,), text, after) for each in options]
        if any(isinstance(each, int) for each in verdicts):
            return name[0], after
        return Verdict.MORE if Verdict.MORE in verdicts else Verdict.NONE

    def _arguments(self) -> bool:
        if self._marks.parameter is None:
            if not self._nested.begun:
                self._held = self._held.lstrip(SPACE)
            return super()._arguments()
        while self._value_read() if self._value is not None else self._parameter_begun():
            pass
        return self._at is not At.ARGUMENTS

    def _parameter_begun(self) -> bool:
        """A parameter begins, or the call ends."""
        parameter, text = self._marks.parameter, self._held
        assert parameter is not None
        at = _match((parameter.opens,), text, 0)
        if isinstance(at, int):
            end = text.find(parameter.keyed[0], at)
            after = _match(parameter.keyed, text, end) if end >= 0 else Verdict.MORE
            if after is Verdict.MORE:
                return False
            key = text[at:end]
            if isinstance(after, int):
                self._argue(
                    f"{', ' if self._values else '{'}{json.dumps(key, ensure_ascii=False)}: "
                )
                self._held = text[after:]
                self._values += 1
                self._value = _Value(self._tool.kind(key), parameter.closes)
                return True
        elif Verdict.MORE in (at, _match(self._marks.ends[:1], text, 0)):
            return False
        self._argue("}" if self._values else "{}")
        self._at = At.REST
        return False

    def _value_read(self) -> bool:
        assert self._value is not None
        told, length = self._value.read(self._held)
        self._argue(told)
        self._held = self._held[length:]
        if not self._value.ended:
            return False
        self._value = None
        return True

    def _argue(self, text: str) -> None:
        last = self._pieces[-1] if self._pieces else None
        if not text:
            return
        if last is not None and last.arguments:
            self._pieces[-1] = CallPiece(last.index, "", last.arguments + text)
        else:
            self._pieces.append(CallPiece(self.calls - 1, arguments=text))

    def _rest(self) -> bool:
        after = _match(self._marks.ends, self._held, 0)
        if after is Verdict.MORE:
            return False
        self._held = self._held[after if isinstance(after, int) else 0 :]
        self._behind_call = True
        self._at = At.AFTER
        return True

    def _after(self) -> bool:
        marks = self._marks
        if not marks.shuts:
            self._at = At.TEXT
            return True
        found = {each: _match((each,), self._held, 0) for each in (marks.begins[0], marks.shuts)}
        shut = found[marks.shuts]
        if isinstance(shut, int):
            self._held, self._at = self._held[shut:], At.TEXT
        elif isinstance(found[marks.begins[0]], int):
            self._mark, self._at = "", At.HEAD
        elif Verdict.MORE in found.values():
            return False
        else:
            self._at = At.TEXT
        return True


class _Value:
    """One value, up to what closes it."""

    def __init__(self, kind: Kind, closes: str) -> None:
        self._kind, self._closes = kind, closes
        self._begun = self._quoted = self._escaped = False
        self._looked = 0  # characters at the beginning of what is held that were looked at
        self.ended = False

    def read(self, text: str) -> tuple[str, int]:
        """JSON of what has come, and how many characters of the text that are."""
        match self._kind:
            case Kind.JSON:
                return self._json(text)
            case Kind.TEXT:
                return self._text(text)
        end = text.find(self._closes)
        if end < 0:
            return "", 0
        self.ended = True
        return _one(text[:end], self._kind), end + len(self._closes)

    def _text(self, text: str) -> tuple[str, int]:
        end = text.find(self._closes)
        self.ended = end >= 0
        length = end if self.ended else len(text) - begins_tag(text, self._closes)
        if not length and not self.ended:
            return "", 0
        told = json.dumps(text[:length], ensure_ascii=False)[1:-1]
        first = "" if self._begun else '"'
        self._begun = True
        if not self.ended:
            return first + told, length
        return f'{first}{told}"', length + len(self._closes)

    def _json(self, text: str) -> tuple[str, int]:
        """What closes it may stand within its quotes."""
        for at, each in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = each == "\\"
                self._quoted = each != '"'
            elif each == '"':
                self._quoted = True
            elif text.startswith(self._closes, at):
                self.ended = True
                return text[:at], at + len(self._closes)
            elif self._closes.startswith(text[at:]):
                return text[:at], at
        return text, len(text)


def _one(text: str, kind: Kind) -> str:
    """A whole value as JSON."""
    if kind is Kind.NULLABLE:
        return "null" if text == "null" else json.dumps(text, ensure_ascii=False)
    try:
        finite.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text  # written anew, half a surrogate pair would be no text, and 1e5 another number


def _skipped(text: str, at: int) -> int:
    """Behind white space."""
    return len(text) - len(text[at:].lstrip(SPACE))


def _match(literals: Literals, text: str, at: int) -> int | Verdict:
    """Where these end, with white space before each of them."""
    for each in literals:
        begin = _skipped(text, at) if each.lstrip(SPACE) == each else at
        if text.startswith(each, begin):
            at = begin + len(each)
        elif each.startswith(text[begin:]):
            return Verdict.MORE
        else:
            return Verdict.NONE
    return at
