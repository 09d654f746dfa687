"""Tool calls: how models write them, and the grammar that makes a model write them so. Pure.

    hermes     text <tool_call> {"name": ..., "arguments": {...}} </tool_call> <tool_call> ...    Qwen
    mistral    text [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    llama3     {"name": ..., "parameters": {...}}; {...}         <|python_tag|> may stand before it
    json       {"name": ..., "arguments": {...}}, or a list of such           any other model

    harmony    messages in channels, one of them to=functions.name            tool_calls_channels.py
    others                                                                    tool_calls_marked.py

Calls of the first two, and of the others, may stand after text, behind a mark. An answer of llama3 and
json is a call from its beginning, or text: then `{"name": "one of the tools", "arguments":` is the mark.
Behind the mark nothing but a call of the request's tools can follow, and its arguments fit the tool's
schema. Where no tool must be called, everything before the mark is free, special tokens included. Nothing
is free where one must be.

baton/server/tools_reader.py reads what this grammar writes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from baton.errors import RequestError
from baton.json_schema import INVALID, NAMED, ONE, SEVERAL, enforceable
from baton.tool_calls_channels import MARKS as CHANNEL_MARKS
from baton.tool_calls_channels import START, ChannelRules, channelled_in, message_text
from baton.tool_calls_marked import (
    MARKED,
    MOST_COPIED,
    MarkedRules,
    Marks,
    check_marked,
    check_name,
    copied,
    marked_in,
    marked_text,
    moved,
)

MOST_SPACE = 64
"""Characters of white space between two parts of a call's beginning: what has more is text."""
JSON_SPACE = rf"/[ \t\r\n]{{0,{MOST_SPACE}}}/"
THINK, THOUGHT = "<think>", "</think>"
"""Around the reasoning of models that write it."""
REMARKS = frozenset({"title", "description", "examples", "default", "$comment", "deprecated", "readOnly",
                     "writeOnly"})  # fmt: skip
MOST_CHARACTERS = 512 * 1024
"""Of all schemas, with their objects closed: references within a schema may repeat what it has."""


class Listing(Enum):
    """Do calls stand in a list?"""

    NEVER = "never"
    ALWAYS = "always"
    SEVERAL = "several"  # one call may stand alone


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a kind of model writes calls."""

    name: str
    opens: str = ""  # before them; empty: they are the beginning of the answer
    closes: str = ""  # after each
    before: str = ""  # may stand before the first
    between: str = ""  # between two
    arguments: str = "arguments"  # the key
    listing: Listing = Listing.NEVER
    id_length: int = 24  # characters of a call's id: what its template takes
    marked: Marks | None = None  # the name stands outside of JSON, between these
    channels: bool = False  # answers are messages in channels, of which reasoning is one

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens of a model."""
        more = self.marked.tokens if self.marked else CHANNEL_MARKS if self.channels else ()
        return tuple(each for each in (self.opens, self.closes, self.before, *more) if each)


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = CallFormat(
    "mistral", "[TOOL_CALLS]", between=",", listing=Listing.ALWAYS, id_length=9
)  # fmt: skip
LLAMA3 = CallFormat("llama3", before="<|python_tag|>", between=";", arguments="parameters")
JSON = CallFormat("json", between=",", listing=Listing.SEVERAL)
HARMONY = CallFormat("harmony", channels=True)
OTHERS = tuple(
    CallFormat(
        name, opens, marked=marks, id_length=9 if name.startswith("mistral") else 24,
        listing=Listing.ALWAYS if marks.shuts else Listing.NEVER,
    )
    for name, (opens, marks) in MARKED.items()
)  # fmt: skip
FORMATS: Mapping[str, CallFormat] = {
    each.name: each for each in (HERMES, MISTRAL, LLAMA3, JSON, HARMONY, *OTHERS)
}


def format_of(template: str) -> CallFormat:
    """That of a chat template's model, by what the template says."""
    if channelled_in(template):
        return HARMONY
    if (name := marked_in(template)) is not None:
        return FORMATS[name]
    if MISTRAL.opens in template:
        return MISTRAL
    if HERMES.opens in template:
        return HERMES
    if LLAMA3.before in template or (
        "<|start_header_id|>" in template and '"parameters"' in template
    ):
        return LLAMA3
    return JSON


def call_text(form: CallFormat, name: str, arguments: str, number: int = 0) -> str:
    """One call; `arguments` is JSON. `number`: of the calls before it."""
    if form.channels:
        return message_text(name, arguments)
    if form.marked is not None:
        return marked_text(form.marked, name, arguments, number)
    return f'{{"name": {_encoded(name)}, "{form.arguments}": {arguments}}}'


def calls_text(form: CallFormat, calls: Sequence[str]) -> str:
    """Calls, each as call_text() writes it, as a whole answer."""
    if form.channels:
        return f"{START}assistant".join(calls)
    if form.marked is not None and form.marked.shuts:
        return "".join((form.opens, *calls, form.marked.shuts))
    if form.marked is not None:
        gap = "\n" if form.marked.begins else ""
        return "".join(f"{form.opens}{gap}{each}" for each in calls)
    if form.closes:
        return "\n".join(f"{form.opens}\n{each}\n{form.closes}" for each in calls)
    joined = f"{form.between} ".join(calls)
    alone = form.listing is Listing.NEVER or (form.listing is Listing.SEVERAL and len(calls) == 1)
    listed = joined if alone else f"[{joined}]"
    return f"{form.opens} {listed}" if form.opens else listed


# ---- a request's calls


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called; `schema` describes its arguments, an object."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Calls:
    """What an answer may be. Raises RequestError for schemas that cannot be enforced."""

    format: CallFormat
    tools: tuple[Tool, ...]
    forced: bool = False  # a tool must be called
    several: bool = True  # more than one call may be made
    thinking: bool | None = None  # the answer begins within reasoning, may begin with it, has none;
    # in channels: True, it goes on with the content of a message
    answer: Mapping[str, Any] | None = None  # the schema of an answer that calls no tool

    def written(self) -> dict[str, Any]:
        """As read() takes it: values of JSON."""
        return {
            "format": self.format.name,
            "tools": [[each.name, each.schema] for each in self.tools],
            "forced": self.forced,
            "several": self.several,
            "thinking": self.thinking,
            "answer": self.answer,
        }

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Calls":
        """Raises RequestError if it is not what written() wrote."""
        match fields:
            case {
                "format": str(name), "tools": [*tools], "forced": bool(forced),
                "several": bool(several), "thinking": bool() | None as thinking,
                "answer": dict() | None as answer, **rest,
            } if not rest and name in FORMATS and all(map(_is_tool, tools)):  # fmt: skip
                found = tuple(Tool(*each) for each in tools)
                # in channels JSON stands in a message, also where no tool is offered
                if tools or (FORMATS[name].channels and answer is not None and not forced):
                    return cls(FORMATS[name], found, forced, several, thinking, answer)
        raise RequestError("these are no tool calls", code=INVALID)


def _is_tool(value: Any) -> bool:
    match value:
        case [str(name), dict()] if name:
            return True
    return False


def bare(schema: Any) -> Any:
    """A schema without what only describes: a model's tools have more of that than of all else."""
    if not isinstance(schema, dict):
        return schema
    found = {key: value for key, value in schema.items() if key not in REMARKS}
    for key, value in found.items():
        if key in NAMED and isinstance(value, dict):
            found[key] = {name: bare(each) for name, each in value.items()}
        elif key in SEVERAL and isinstance(value, list):
            found[key] = [bare(each) for each in value]
        elif key in ONE:
            found[key] = bare(value)
    return found


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema as it is enforced: of an object. Raises RequestError for one that is not, and for
    what cannot be enforced."""
    given = schema.get("type", "object")
    if given != "object" and given != ["object"]:
        raise RequestError(
            f"arguments are an object, not of type {json.dumps(given)[:40]}", code=INVALID
        )
    return enforceable({**schema, "type": "object"})


def closed_schemas(calls: Calls) -> list[dict[str, Any]]:
    """All of them as they are enforced. Raises RequestError for one that cannot be, and if they grow too
    large when their objects are closed."""
    schemas = [arguments_schema(each.schema) for each in calls.tools]
    if calls.answer is not None:
        schemas.append(enforceable(calls.answer))
    size = sum(len(json.dumps(each)) for each in schemas)
    if calls.format.channels:
        for tool in calls.tools:
            check_name(tool.name)
    if calls.format.marked is not None:
        for tool, schema in zip(calls.tools, schemas, strict=False):
            check_marked(calls.format.marked, tool.name, schema)
        if calls.format.marked.parameter is not None:
            _check_copied(sum(map(copied, schemas[: len(calls.tools)])))
    if size > MOST_CHARACTERS:
        text = f"the tools' schemas, with their objects closed, have {size:,} characters"
        limit = f"{MOST_CHARACTERS:,} are the limit: offer fewer tools"
        raise RequestError(f"{text}, {limit}", code=INVALID)
    return schemas


def _check_copied(characters: int) -> None:
    if characters > MOST_COPIED:
        text = f"the parameters of all tools, each with the definitions it refers to, have {characters:,}"
        limit = f"{MOST_COPIED:,} are the limit: offer fewer tools, or refer to fewer definitions"
        raise RequestError(f"{text} characters, {limit}", code=INVALID)


# ---- as rules


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Of a model's tokenizer, without those that end an answer."""

    ids: Sequence[int] = ()
    by_text: Mapping[str, int] = field(default_factory=dict)

    def any_but(self, *texts: str) -> str:
        """One of them, as a rule's part; empty if there is none."""
        but = {self.by_text[each] for each in texts if each in self.by_text}
        ranges: list[tuple[int, int]] = []  # some models have thousands in a row
        for each in sorted(set(self.ids) - but):
            if ranges and each == ranges[-1][1] + 1:
                ranges[-1] = ranges[-1][0], each
            else:
                ranges.append((each, each))
        listed = ",".join(f"{low}-{high}" for low, high in ranges)
        return f"<[{listed}]>" if listed else ""

    def named(self, text: str) -> str:
        """The one with this text, as a rule's part; empty if there is none."""
        found = self.by_text.get(text)
        return "" if found is None else f"<[{found}]>"


def rules_of(calls: Calls, special: SpecialTokens, gap: str) -> str:
    """The rules in llguidance's notation. `gap`: a pattern of the white space between parts of JSON.

    Where rules compete, one that is lazy wins at its last character. So what is text ends where a mark is
    complete, and reasoning where its end is."""
    return "\n".join(_Rules(calls, special, gap).lines()) + "\n"


class _Rules:
    def __init__(self, calls: Calls, special: SpecialTokens, gap: str) -> None:
        self._calls = calls
        self._form = calls.format
        self._special = special
        self._gap = gap
        self._free = not calls.forced and calls.answer is None
        self._names = [f"call_{index}" for index in range(len(calls.tools))]
        marked = calls.format.marked
        self._marked = None if marked is None else MarkedRules(marked, special, self._json)

    def lines(self) -> Iterator[str]:
        yield "%llguidance {}"
        yield f"GAP: /{self._gap}/"
        yield r"SPACE: /[\s\x1c-\x1f]*/"
        yield rf"SHORT: /[\s\x1c-\x1f]{{0,{MOST_SPACE}}}/"
        yield r"TEXT: /(?s:.*)/"
        if self._form.channels:
            yield from self._channels()
            return
        if self._marked is not None:
            yield from self._marked.shared()
        yield from self._thinking()
        yield from self._answer()
        yield f"call: {_either(*self._names)}"
        for name, tool in zip(self._names, self._calls.tools, strict=True):
            yield from self._call(name, tool)

    def _channels(self) -> Iterator[str]:
        calls = self._calls
        rules = ChannelRules(
            [(each.name, arguments_schema(each.schema)) for each in calls.tools],
            self._special,
            self._json,
            forced=calls.forced,
            answer=None if calls.answer is None else enforceable(calls.answer),
            begun=calls.thinking is True,
        )
        yield from rules.lines()

    def _thinking(self) -> Iterator[str]:
        if self._calls.thinking is None:
            yield "start: answer"
            return
        other, end = self._special.any_but(THOUGHT), self._special.named(THOUGHT)
        thoughts = f"(TEXT {other})* " if other else ""
        yield f"thinking: {thoughts}{_either('thought_end', end and f'TEXT {end}')}"
        yield f"thought_end[lazy]: TEXT {_text(THOUGHT)}"
        yield r"BREAK: /[ \t\r\n]{0,8}/"
        after = f"thinking answer | {thoughts}TEXT" if self._free else "thinking BREAK answer"
        if self._calls.thinking:
            yield f"start: {after}"
            return
        begin, space = self._special.named(THINK), "SPACE" if self._free else "BREAK"
        yield f"think: {_either('think_begin', begin and f'{space} {begin}')}"
        yield f"think_begin[lazy]: {space} {_text(THINK)}"
        yield f"start: answer | think ({after})"

    def _answer(self) -> Iterator[str]:
        if self._free:
            yield from self._after_text() if self._form.opens else self._or_text()
            return
        calls = self._opened() if self._form.opens else self._listed("call", "call")
        before = self._special.named(self._form.before) if self._form.before else ""
        lead = f"{before}? " if before else ""
        if self._calls.forced or self._calls.answer is None:
            yield f"answer: {lead}{calls}"
            return
        if not self._form.opens:
            calls = _either(*(self._json(each) for each in self._whole_calls()))
        yield f"answer: {lead}{calls} | {self._json(enforceable(self._calls.answer))}"

    def _whole_calls(self) -> Iterator[dict[str, Any]]:
        """One call as JSON. Where the answer is JSON in any case, llguidance must not choose between
        rules and schemas at the first bracket."""
        key = self._form.arguments
        for tool in self._calls.tools:
            schema = moved(arguments_schema(tool.schema), f"#/properties/{key}")
            yield {
                "type": "object", "properties": {"name": {"const": tool.name}, key: schema},
                "required": ["name", key], "additionalProperties": False,
            }  # fmt: skip

    def _other(self) -> str:
        """Special tokens that may stand in a free text."""
        taken = () if self._calls.thinking is None else (THINK,)
        inside = [each for each in self._form.marks if each in self._form.opens]
        return self._special.any_but(*inside, *taken)

    def _after_text(self) -> Iterator[str]:
        """Text, then calls behind a mark."""
        other, mark = self._other(), self._special.named(self._form.opens)
        by_id = (
            self._marked.after_text(self._form.opens) if self._marked else mark and f"TEXT {mark}"
        )
        yield f"text_opens[lazy]: TEXT {_text(self._form.opens)}"
        yield f"opens: {_either('text_opens', by_id)}"
        text = other and f"TEXT {other}"
        if self._calls.several and self._form.listing is Listing.NEVER:
            yield f"answer: {_either(text, f'opens {self._called()}')}* TEXT"
        else:
            yield f"answer: {f'({text})* ' if text else ''}(TEXT | opens {self._called()})"

    def _or_text(self) -> Iterator[str]:
        """Calls, or text. Special tokens, which users do not see, may stand before both."""
        other = self._other()
        lead, tail = (f"(SPACE {other})* ", f" ({other} TEXT)*") if other else ("", "")
        yield f"answer: {lead}(calls | TEXT{tail})"
        yield f"calls: {self._listed('first', 'first_listed')}"
        for first in self._firsts():
            yield f"{first}: {_either(*(f'{first}_{name}' for name in self._names))}"

    def _firsts(self) -> dict[str, tuple[str, ...]]:
        """Rules of a first call, and what their marks begin with."""
        listed = {"first_listed": ("[",)} if self._form.listing is Listing.SEVERAL else {}
        return {"first": (), **listed}

    def _opened(self) -> str:
        """Calls behind marks."""
        mark = self._special.named(self._form.opens) or _text(self._form.opens)
        mark = self._marked.literal(self._form.opens) if self._marked else mark
        one = f"{mark} {self._called()}"
        again = self._calls.several and self._form.listing is Listing.NEVER
        return f"{one} (GAP? {one})*" if again else one

    def _called(self) -> str:
        """What follows a mark."""
        if self._marked is not None:
            return self._marked.called(several=self._calls.several)
        if self._form.listing is Listing.ALWAYS:
            return f"GAP? {self._listed('call', 'call')}"
        close = self._special.named(self._form.closes)
        return f"GAP? call GAP? {_either(close, _text(self._form.closes))}"

    def _listed(self, first: str, first_listed: str) -> str:
        """One call, or several if they may be. Where text may stand in their place, the first has a mark
        of its own, in which the bracket is."""
        several, form = self._calls.several, self._form
        rest = f' (GAP? "{form.between}" GAP? call)*' if several else ""
        if form.listing is Listing.NEVER:
            return f"{first}{rest}"
        bracket = "" if first_listed != "call" else '"[" GAP? '
        listed = f'{bracket}{first_listed}{rest} GAP? "]"'
        if form.listing is Listing.ALWAYS:
            return listed
        # a list that begins as one of calls is read as one: as a text it would not be of their schemas
        return f"({first} | {listed})" if several or self._free else first

    def _call(self, name: str, tool: Tool) -> Iterator[str]:
        if self._marked is not None:
            yield from self._marked.call(name, tool.name, arguments_schema(tool.schema))
            return
        arguments = f'{self._json(arguments_schema(tool.schema))} GAP? "}}"'
        parts = ["{", '"name"', ":", _encoded(tool.name), ",", _encoded(self._form.arguments), ":"]
        head = " GAP? ".join(map(_text, parts))
        yield f"{name}_head[lazy]: {head}"
        yield f"{name}: {name}_head GAP? {name}_rest"
        yield f"{name}_rest: {arguments}"
        if not self._free or self._form.opens:
            return
        # a mark has all space that the reader allows; elsewhere it is limited, as in all JSON
        for first, bracket in self._firsts().items():
            head = f" {JSON_SPACE} ".join(map(_text, [*bracket, *parts]))
            before = f"({_text(self._form.before)} SHORT)? " if self._form.before else ""
            yield f"{first}_{name}_head[lazy]: SPACE {before}{head}"
            yield f"{first}_{name}: {first}_{name}_head GAP? {name}_rest"

    def _json(self, schema: Mapping[str, Any]) -> str:
        inside = {**schema, "x-guidance": {"whitespace_pattern": self._gap}}
        return f"%json {json.dumps(inside, ensure_ascii=False, allow_nan=False)}"


def _encoded(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text(text: str) -> str:
    """A text, as a rule's part."""
    return json.dumps(text, ensure_ascii=False)


def _either(*parts: str) -> str:
    found = [each for each in parts if each]
    return f"({' | '.join(found)})"
