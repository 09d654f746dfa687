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
from baton.server.tools_reader import At, CallPiece, CallReader, Nested, Verdict, skipped
from baton.server.unquoted import Unquoted
from baton.tool_calls import CallFormat
from baton.tool_calls_marked import NAME, Kind, Literals, Marks, ParameterMarks, Parameters

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
        self._longest = max(map(len, self._tools), default=0)
        super().__init__(form, self._tools, forced=forced)
        self._marks, self._parameters = marks, parameters
        self._tool = ANY_PARAMETERS
        self._values = 0  # parameters of this call so far
        self._key: list[str] | None = None  # of the parameter that begins, as far as it has come
        self._value: _Value | None = None
        self._ended = 0  # marks behind the arguments that have come

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
        self._tool = self._parameters.get(name, ANY_PARAMETERS)
        self._values = self._ended = 0
        self._key = self._value = None
        self._nested = Nested()
        self._at = At.ARGUMENTS
        return True

    def _name(self) -> tuple[str, int] | Verdict:
        """The name, and how long the call is up to its arguments."""
        marks, text = self._marks, self._held
        at = _match(marks.begins, text, 0)
        if isinstance(at, Verdict):
            return at
        begin = at if marks.begins else skipped(text, 0)
        if begin is None:
            return Verdict.NONE
        name = NAME.match(text, begin)
        end = name.end() if name else begin
        if end == len(text):
            return Verdict.MORE if end - begin <= self._longest else Verdict.NONE
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
        parameter = self._marks.parameter
        assert parameter is not None
        if self._key is None:
            self._held = self._held.lstrip(SPACE)
            at = _match((parameter.opens,), self._held, 0)
            if isinstance(at, int):
                self._key, self._held = [], self._held[at:]
            elif Verdict.MORE in (at, _match(self._marks.ends[:1], self._held, 0)):
                return False
        if self._key is None or (found := self._keyed(parameter, self._key)) is Verdict.NONE:
            self._argue("}" if self._values else "{}")
            self._at = At.REST
            return False
        return found is not Verdict.MORE

    def _keyed(self, parameter: ParameterMarks, parts: list[str]) -> Verdict | None:
        """The key is complete, and its value begins: None."""
        forms = [each for each in (parameter.keyed, parameter.keyed_json) if each]
        places = {self._held.find(each[0]): each for each in forms}
        end = min((each for each in places if each >= 0), default=-1)
        if end < 0:
            begun = max(begins_tag(self._held, each[0]) for each in forms)
            told = len(self._held) - begun
            parts.append(self._held[:told])
            self._held = self._held[told:]
            return Verdict.MORE
        after = _match(places[end], self._held, end)
        if after is Verdict.MORE:
            return Verdict.MORE
        parts.append(self._held[:end])
        key, self._key = "".join(parts), None
        if isinstance(after, Verdict):
            self._held = parameter.opens + key + self._held[end:]
            return Verdict.NONE
        self._argue(f"{', ' if self._values else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        kind = self._tool.kind(key)
        if len(forms) > 1:  # the model says what it is
            kind = Kind.TEXT if places[end] is parameter.keyed else Kind.JSON
        self._held = self._held[after:]
        self._values += 1
        self._value = _Value(kind, parameter.closes)
        return None

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
        while self._ended < len(self._marks.ends):
            self._held = self._held.lstrip(SPACE)
            after = _match((self._marks.ends[self._ended],), self._held, 0)
            if after is Verdict.MORE:
                return False
            if not isinstance(after, int):
                break
            self._held = self._held[after:]
            self._ended += 1
        self._behind_call = True
        self._at = At.AFTER
        return True

    def _after(self) -> bool:
        marks = self._marks
        if not marks.shuts:
            self._at = At.TEXT
            return True
        self._held = self._held.lstrip(SPACE)
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
    """One value, up to what closes it. What may begin that is left for the next piece."""

    def __init__(self, kind: Kind, closes: str) -> None:
        self._kind, self._closes = kind, closes
        self._begun = False
        self._json = Unquoted(re.escape(closes)) if kind is Kind.JSON else None
        self._parts: list[str] = []  # of one that is told when it is complete
        self.ended = False

    def read(self, text: str) -> tuple[str, int]:
        """JSON of what has come, and how many characters of the text that are."""
        end = self._end(text)
        self.ended = end is not None
        length = len(text) - begins_tag(text, self._closes) if end is None else end
        return self._told(text[:length]), length + (len(self._closes) if self.ended else 0)

    def _end(self, text: str) -> int | None:
        """Where it ends: within the quotes of JSON it does not."""
        if self._json is None:
            end = text.find(self._closes)
            return end if end >= 0 else None
        found = next(self._json.found(text[: len(text) - begins_tag(text, self._closes)]), None)
        return None if found is None else found.start()

    def _told(self, text: str) -> str:
        if self._kind is Kind.JSON:
            return text
        if self._kind is not Kind.TEXT:
            self._parts.append(text)
            return _one("".join(self._parts), self._kind) if self.ended else ""
        if not text and not self.ended:
            return ""
        first, last = "" if self._begun else '"', '"' if self.ended else ""
        self._begun = True
        return f"{first}{json.dumps(text, ensure_ascii=False)[1:-1]}{last}"


def _one(text: str, kind: Kind) -> str:
    """A whole value as JSON."""
    if kind is Kind.NULLABLE:
        return "null" if text == "null" else json.dumps(text, ensure_ascii=False)
    try:
        finite.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text  # written anew, half a surrogate pair would be no text, and 1e5 another number


def _match(literals: Literals, text: str, at: int) -> int | Verdict:
    """Where these end, with white space before each of them."""
    for each in literals:
        begin = skipped(text, at) if each.lstrip(SPACE) == each else at
        if begin is None:
            return Verdict.NONE
        if text.startswith(each, begin):
            at = begin + len(each)
        elif each.startswith(text[begin:]):
            return Verdict.MORE
        else:
            return Verdict.NONE
    return at
