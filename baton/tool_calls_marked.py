"""Marked calls: the name stands outside of JSON. How models write them, and their grammar. Pure.

    mistral_v13   [TOOL_CALLS]name[ARGS]{...}
    deepseek_v31  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
                  <｜tool▁calls▁end｜>; deepseek_v3 (and R1): JSON in a fence
    kimi_k2       the same with other marks, and numbered names: functions.name:0
    qwen3_coder   <tool_call><function=name><parameter=key>\\nvalue\\n</parameter> ... </function> ...
    glm45         <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value> ... </tool_call>
    minimax_m2    <minimax:tool_call><invoke name="name"><parameter name="key">value</parameter> ...
    deepseek_v32  the same with <｜DSML｜function_calls>, <｜DSML｜invoke ..., and string="true", "false"

In the last four the arguments are no JSON object but a value for each parameter. A text stands there as
it is, anything else as JSON. Which of them a value is follows from the parameter's schema, so the grammar
and the reader (baton/server/tools_marked.py) agree; DeepSeek V3.2 writes it. Parameters come in the
schema's order, as in JSON.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol
from urllib.parse import quote

from baton import finite
from baton.errors import RequestError
from baton.json_schema import INVALID, NO_ASSERTION

NAME = re.compile(r"[\w./-]+")
"""Of a tool: it ends where another character comes."""
KEY = re.compile(r'[^<>"\s](?:[^<>"\n]*[^<>"\s])?')
"""Of a parameter."""
WHOLE = "whole"
PLACE = f"#/$defs/{WHOLE}"
"""Where the schema of a tool stands within the schema of a parameter that refers to its definitions."""
MOST_COPIED = 512 * 1024
"""Characters of the schemas in all such parameters together, of a tool and of all tools of a request:
each parameter has its own copy."""
TOP = {"type", "properties", "required", "additionalProperties"}
"""What the schema of a tool whose parameters stand one by one may say at its top."""
Literals = tuple[str, ...]
"""Texts with white space between them, or none."""


@dataclass(frozen=True, slots=True)
class ParameterMarks:
    """Around the key and the value of a parameter. The value stands between `keyed` and `closes`."""

    opens: str
    keyed: Literals
    closes: str
    keyed_json: Literals = ()  # before JSON, in place of `keyed`, where the model says what a value is


@dataclass(frozen=True, slots=True)
class Marks:
    """Around the parts of a call, behind what opens calls (CallFormat.opens)."""

    begins: Literals = ()  # before the name
    named: Literals = ()  # behind it
    ends: Literals = ()  # behind the arguments
    shuts: str = ""  # behind all calls; empty: each call is opened by itself
    numbered: bool = False  # `:0` behind the name
    parameter: ParameterMarks | None = None  # None: the arguments are JSON
    tokens: tuple[str, ...] = ()  # that models have as tokens


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
             "<｜tool▁calls▁end｜>")  # fmt: skip
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
         "<|tool_call_end|>", "<|tool_calls_section_end|>")  # fmt: skip
_DSML = "｜DSML｜"
_GLM = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MARKED: Mapping[str, tuple[str, Marks]] = {
    "mistral_v13": ("[TOOL_CALLS]", Marks(named=("[ARGS]",), tokens=("[TOOL_CALLS]", "[ARGS]"))),
    "deepseek_v3": (_DEEPSEEK[0], Marks(
        (f"{_DEEPSEEK[1]}function{_DEEPSEEK[2]}",), ("```json",), ("```", _DEEPSEEK[3]), _DEEPSEEK[4],
        tokens=_DEEPSEEK,
    )),
    "deepseek_v31": (_DEEPSEEK[0], Marks(
        (_DEEPSEEK[1],), (_DEEPSEEK[2],), (_DEEPSEEK[3],), _DEEPSEEK[4], tokens=_DEEPSEEK
    )),
    "kimi_k2": (_KIMI[0], Marks(
        (f"{_KIMI[1]}functions.",), (_KIMI[2],), (_KIMI[3],), _KIMI[4], numbered=True, tokens=_KIMI
    )),
    "deepseek_v32": (f"<{_DSML}function_calls>", Marks(
        (f'<{_DSML}invoke name="',), ('">',), (f"</{_DSML}invoke>",), f"</{_DSML}function_calls>",
        tokens=(_DSML,),
        parameter=ParameterMarks(
            f'<{_DSML}parameter name="', ('" string="true">',), f"</{_DSML}parameter>",
            ('" string="false">',),
        ),
    )),
    "qwen3_coder": ("<tool_call>", Marks(
        ("<function=",), (">",), ("</function>", "</tool_call>"), tokens=("<tool_call>", "</tool_call>"),
        parameter=ParameterMarks("<parameter=", (">\n",), "\n</parameter>"),
    )),
    "glm45": ("<tool_call>", Marks(
        ends=("</tool_call>",), tokens=_GLM,
        parameter=ParameterMarks("<arg_key>", ("</arg_key>", "<arg_value>"), "</arg_value>"),
    )),
    "minimax_m2": ("<minimax:tool_call>", Marks(
        ('<invoke name="',), ('">',), ("</invoke>",), "</minimax:tool_call>",
        tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
        parameter=ParameterMarks('<parameter name="', ('">',), "</parameter>"),
    )),
}  # fmt: skip
"""By name: what opens calls, and the rest."""


def marked_in(template: str) -> str | None:
    """The format among these that a chat template's model has."""
    if "[TOOL_CALLS]" in template:
        return "mistral_v13" if "[ARGS]" in template else None
    if _DEEPSEEK[0] in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    for name, mark in (
        ("deepseek_v32", f"{_DSML}function_calls"), ("kimi_k2", _KIMI[0]),
        ("minimax_m2", "<minimax:tool_call>"), ("qwen3_coder", "<function="), ("glm45", "<arg_key>"),
    ):  # fmt: skip
        if mark in template:
            return name
    return None


# ---- what the values of parameters are


class Kind(Enum):
    """How a value stands between its marks."""

    TEXT = auto()
    NULLABLE = auto()  # a text, or null
    JSON = auto()
    ANY = auto()  # JSON if it reads as such, else a text


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `texts`: the only ones that it may be; empty: any."""

    kind: Kind
    schema: Any = field(default_factory=dict)
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameters:
    """Those of a tool. `others`: what further ones are; None: there are none."""

    known: Mapping[str, Parameter]
    required: frozenset[str] = frozenset()
    others: Parameter | None = None

    def kind(self, key: str) -> Kind:
        """Of a parameter with this key."""
        found = self.known.get(key) or self.others
        return found.kind if found else Kind.ANY


def check_marked(marks: Marks, name: str, schema: Mapping[str, Any]) -> None:
    """Raises RequestError for a tool whose calls cannot be written so."""
    check_name(name)
    if marks.parameter is not None:
        parameters_of(name, schema)


def check_name(name: str) -> None:
    """Raises RequestError for a tool's name that cannot stand in a call."""
    if not NAME.fullmatch(name):
        rule = "use letters, digits, _, - and ."
        text = f"the tool's name {name[:80]!r} cannot be written in calls: {rule}"
        raise RequestError(text, code=INVALID)


def parameters_of(name: str, schema: Mapping[str, Any]) -> Parameters:
    """Of a tool with this schema, whose objects are closed. Raises RequestError for what cannot be
    written one by one."""
    beyond = [each for each in schema if each not in TOP | NO_ASSERTION]
    if beyond:
        text = (
            f"the model writes arguments one by one, so the schema of {name[:80]} can have no "
            f"{beyond[0]} at its top: describe its properties only"
        )
        raise RequestError(text, code=INVALID)
    more, named, unnamed = _others(schema)
    properties = schema.get("properties", {})
    for key in (*properties, *unnamed):
        if not KEY.fullmatch(key):
            text = f"{name[:80]} has a parameter {key[:80]!r}: the model cannot write its name"
            raise RequestError(text, code=INVALID)
    refer, repeated = _referring(schema), len(unnamed) * len(json.dumps(more))
    if copied(schema) - repeated > MOST_COPIED:
        text = f"{refer} parameters of {name[:80]} refer to its definitions: offer fewer"
        raise RequestError(text, code=INVALID)
    if repeated > MOST_COPIED:
        text = f"{len(unnamed)} parameters that {name[:80]} requires are none of its properties"
        raise RequestError(f"{text}: describe them there", code=INVALID)
    whole = moved(schema, PLACE) if refer else None
    known = {key: parameter_of(each, schema, key, whole) for key, each in properties.items()}
    others = None if more is False else parameter_of(more, schema, None, whole)
    if others is not None:
        known |= dict.fromkeys(unnamed, others)
    return Parameters(known, frozenset(named), others)


def copied(schema: Mapping[str, Any]) -> int:
    """Characters of the copies that the parameters of a tool with this schema have in a grammar."""
    more, _, unnamed = _others(schema)
    refer = _referring(schema)
    whole = refer * len(json.dumps(schema)) if refer else 0
    return whole + len(unnamed) * len(json.dumps(more))


def _others(schema: Mapping[str, Any]) -> tuple[Any, list[str], dict[str, Any]]:
    """What parameters that are no properties must be, the names of all that are required, and those of
    them that are no properties."""
    more, required = schema.get("additionalProperties", True), schema.get("required")
    named = (
        [each for each in required if isinstance(each, str)] if isinstance(required, list) else []
    )
    properties = schema.get("properties", {})
    unnamed = {} if more is False else {each: more for each in named if each not in properties}
    return more, named, unnamed


def _referring(schema: Mapping[str, Any]) -> int:
    """How many parameters have a copy of the whole schema."""
    more, _, unnamed = _others(schema)
    return sum(map(_refers, schema.get("properties", {}).values())) + _refers(more) * (
        len(unnamed) + 1
    )


def parameter_of(
    schema: Any, root: Mapping[str, Any], key: str | None = None, whole: Any = None
) -> Parameter:
    """What its values are. `root`: the tool's schema, which the parameter's may refer to; `whole`: the
    same, moved to PLACE, for all parameters of the tool."""
    if schema is False:
        raise RequestError(f"no value fits the parameter {str(key)[:80]}", code=INVALID)
    if schema is True:
        schema = {}
    found = _resolved(schema, root)
    if not isinstance(found, dict):
        return Parameter(Kind.JSON, schema)
    said = {name: value for name, value in found.items() if name not in NO_ASSERTION}
    if not said:
        return Parameter(Kind.ANY)
    texts = _texts(said)
    if texts is not None:
        return Parameter(Kind.TEXT, texts=texts)
    if said == {"type": ["string", "null"]} or said == {"type": ["null", "string"]}:
        return Parameter(Kind.NULLABLE)
    match said:
        case {"anyOf": [one, other], **rest} if not rest:
            for given, null in ((one, other), (other, one)):
                inner = _resolved(given, root)
                if null == {"type": "null"} and isinstance(inner, dict):
                    texts = _texts({k: v for k, v in inner.items() if k not in NO_ASSERTION})
                    if texts is not None and "null" not in texts:
                        return Parameter(Kind.NULLABLE, texts=(*texts, "null") if texts else ())
    if not _refers(schema):
        return Parameter(Kind.JSON, schema)
    return Parameter(
        Kind.JSON, _standing_alone(key, moved(root, PLACE) if whole is None else whole)
    )


def _texts(said: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The texts that it may be, () for any. None: it is something else, or not every text fits."""
    match said:
        case {"type": "string", **rest} if not rest:
            return ()
        case {"enum": [*texts], **rest} if rest in ({}, {"type": "string"}):
            pass
        case {"const": text, **rest} if rest in ({}, {"type": "string"}):
            texts = [text]
        case _:
            return None
    plain = all(isinstance(each, str) and KEY.fullmatch(each) for each in texts)
    return tuple(texts) if plain and texts else None


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema that only refers to a definition is that."""
    for _ in range(8):
        match schema:
            case {"$ref": str(reference), **rest} if not rest.keys() - NO_ASSERTION:
                place = re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", reference)
                found = root.get(place[1], {}).get(place[2]) if place else None
                if found is None:
                    return None
                schema = found
            case _:
                break
    return schema


def _refers(schema: Any) -> bool:
    return '"$ref"' in json.dumps(schema)


def _standing_alone(key: str | None, whole: Any) -> Any:
    """The schema of a parameter with all that it refers to. `whole`: the tool's."""
    step = "additionalProperties"
    if key is not None:
        step = f"properties/{quote(key.replace('~', '~0').replace('/', '~1'))}"
    return {"$ref": f"{PLACE}/{step}", "$defs": {WHOLE: whole}}


def moved(schema: Any, place: str) -> Any:
    """A schema that stands elsewhere: its references within itself begin there."""
    if isinstance(schema, list):
        return [moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = f"{place}{reference[1:]}"
    return found


# ---- as text


def marked_text(marks: Marks, name: str, arguments: str, number: int) -> str:
    """One call. `arguments` is JSON; if it is not, as in an example, it stands where values do."""
    number_ = f":{number}" if marks.numbered else ""
    inside = f"\n{arguments}\n" if marks.named == ("```json",) else arguments
    if marks.parameter is not None:
        inside = f"\n{_parameters_text(marks.parameter, arguments)}"
    gap = "\n" if marks.named == ("```json",) else ""
    return "".join(
        (*marks.begins, name, number_, gap, *marks.named, inside, "\n".join(marks.ends))
        if marks.parameter
        else (*marks.begins, name, number_, gap, *marks.named, inside, *marks.ends)
    )


def _parameters_text(marks: ParameterMarks, arguments: str) -> str:
    try:
        given = finite.loads(arguments)
    except (ValueError, RecursionError):
        given = {"...": "..."}
    values = given.items() if isinstance(given, dict) else [("...", arguments)]

    def keyed(value: Any) -> str:
        text = isinstance(value, str) or not marks.keyed_json
        return "".join(marks.keyed if text else marks.keyed_json)

    return "".join(
        f"{marks.opens}{key}{keyed(value)}"
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}{marks.closes}\n"
        for key, value in values
    )


# ---- as rules


class Special(Protocol):
    """A model's special tokens."""

    def named(self, text: str) -> str:
        """The one with this text, as a rule's part; empty if there is none."""


class MarkedRules:
    """The rules of marked calls. `json_of`: a rule's part for JSON of a schema."""

    def __init__(self, marks: Marks, special: Special, json_of: Callable[[Any], str]) -> None:
        self._marks, self._special, self._json = marks, special, json_of

    def shared(self) -> Iterator[str]:
        """What all calls use."""
        yield r"WS: /[ \t\r\n]{1,8}/"
        if self._marks.numbered:
            yield "NUMBER: /[0-9]{1,3}/"
        if (parameter := self._marks.parameter) is not None:
            yield f"value_text[lazy]: TEXT {json.dumps(parameter.closes, ensure_ascii=False)}"
            by_id = self.after_text(parameter.closes)
            yield f"value: value_text | {by_id}" if by_id else "value: value_text"

    def called(self, *, several: bool) -> str:
        """What follows the mark that opens calls."""
        if not self._marks.shuts:
            return "WS? call"
        rest = "(WS? call)*" if several else ""
        return f"WS? call {rest} WS? {self.literal(self._marks.shuts)}"

    def call(self, name: str, tool: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """The rule `name` of a call of this tool."""
        marks = self._marks
        head = [*self._literals(marks.begins), _quoted(tool)]
        if marks.numbered:
            head.append('":" NUMBER')
        for each in marks.named:
            head += ["WS?", self.literal(each)] if each == "```json" else [self.literal(each)]
        ends = self._literals(marks.ends)
        if marks.parameter is None:
            inside = ["WS?", self._json(schema), *(["WS?"] if ends else [])]
            yield f"{name}: {' '.join([*head, *inside, *ends])}"
            return
        yield from self._parameters(name, marks.parameter, parameters_of(tool, schema))
        yield f"{name}: {' '.join([*head, f'{name}_values', 'WS?', *ends])}"

    def _parameters(self, name: str, marks: ParameterMarks, given: Parameters) -> Iterator[str]:
        parts = []
        for index, (key, each) in enumerate(given.known.items()):
            yield f"{name}_{index}: {self._one(marks, _quoted(key), each)}"
            parts.append(f"{name}_{index}{'' if key in given.required else '?'}")
        if given.others is not None:
            known = "|".join(re.escape(each) for each in given.known).replace("/", r"\/")
            key = r'/[^<>"\n\t\r ]+/'
            lexeme = f"KEY_{name.upper()}"
            yield f"{lexeme}: {key}{f' & ~/({known})/' if known else ''}"
            yield f"{name}_other: {self._one(marks, lexeme, given.others)}"
            parts.append(f"{name}_other*")
        yield f"{name}_values: {' '.join(parts)}" if parts else f'{name}_values: ""'

    def _one(self, marks: ParameterMarks, key: str, given: Parameter) -> str:
        lead = f"WS? {self.literal(marks.opens)} {key}"
        head = f"{lead} {' WS? '.join(map(self.literal, marks.keyed))}"
        if marks.keyed_json:
            json_head = f"{lead} {' WS? '.join(map(self.literal, marks.keyed_json))}"
            return self._said(head, json_head, given, self.literal(marks.closes))
        if given.texts:
            texts = " | ".join(map(_quoted, given.texts))
            return f"{head} ({texts}) {self.literal(marks.closes)}"
        if given.kind is Kind.JSON:
            return f"{head} {self._json(given.schema)} {self.literal(marks.closes)}"
        return f"{head} value"

    def _said(self, head: str, json_head: str, given: Parameter, closes: str) -> str:
        """Where the model says whether a value is a text or JSON."""
        nullable = given.kind is Kind.NULLABLE
        texts = [_quoted(each) for each in given.texts if not (nullable and each == "null")]
        text = f"{head} ({' | '.join(texts)}) {closes}" if texts else f"{head} value"
        if given.kind is Kind.TEXT:
            return text
        schema = {"type": "null"} if nullable else given.schema
        value = f"{json_head} {self._json(schema)} {closes}"
        return value if given.kind is Kind.JSON else f"({text} | {value})"

    def after_text(self, mark: str) -> str:
        """Any text, then this mark with special tokens in it, by their ids; empty if it has none."""
        parts = self._parts(mark)
        at = next((i for i, each in enumerate(parts) if self._special.named(each)), None)
        if at is None:
            return ""
        before = "".join(parts[:at])
        text = f"/(?s:.*){re.escape(before).replace('/', chr(92) + '/')}/" if before else "TEXT"
        rest = " ".join(self._special.named(each) or _quoted(each) for each in parts[at:])
        return f"{text} {rest}"

    def _parts(self, text: str) -> list[str]:
        tokens = [each for each in self._marks.tokens if self._special.named(each)]
        split = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
        return [each for each in split if each]

    def _literals(self, texts: Sequence[str]) -> list[str]:
        found: list[str] = []
        for each in texts:
            found += ["WS?", self.literal(each)] if found else [self.literal(each)]
        return found

    def literal(self, text: str) -> str:
        """A text, with the special tokens in it by their ids."""
        parts = (self._special.named(each) or _quoted(each) for each in self._parts(text))
        return " ".join(parts)


def _quoted(text: str) -> str:
    """As a rule's part."""
    return json.dumps(text, ensure_ascii=False)
