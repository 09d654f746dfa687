"""Tool calls: how models write them, and the grammar that makes a model write them so. Pure.

    hermes     text <tool_call> {"name": ..., "arguments": {...}} </tool_call> <tool_call> ...    Qwen, Hermes
    mistral    text [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    llama3     {"name": ..., "parameters": {...}}; {...}         <|python_tag|> may stand before it
    json       {"name": ..., "arguments": {...}}, or a list of such           any other model

Calls of the first two may stand after text, behind a mark. An answer of the last two is a call from its
beginning, or text: then `{"name": "one of the tools", "arguments":` is the mark. Behind the mark nothing but
a call of the request's tools can follow, and its arguments fit the tool's schema. Where no tool must be
called, everything before the mark is free, special tokens included. Nothing is free where one must be.

baton/server/tools_reader.py reads what this grammar writes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from baton.errors import RequestError
from baton.json_schema import INVALID, enforceable

THINK, THOUGHT = "<think>", "</think>"
"""Around the reasoning of models that write it."""
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

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens of a model."""
        return tuple(each for each in (self.opens, self.closes, self.before) if each)


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = CallFormat(
    "mistral", "[TOOL_CALLS]", between=",", listing=Listing.ALWAYS, id_length=9
)  # fmt: skip
LLAMA3 = CallFormat("llama3", before="<|python_tag|>", between=";", arguments="parameters")
JSON = CallFormat("json", between=",", listing=Listing.SEVERAL)
FORMATS: Mapping[str, CallFormat] = {each.name: each for each in (HERMES, MISTRAL, LLAMA3, JSON)}


def format_of(template: str) -> CallFormat:
    """That of a chat template's model, by what the template says."""
    if MISTRAL.opens in template:
        return MISTRAL
    xml = any(each in template for each in ("<function=", "<arg_key>", "<parameter="))
    if HERMES.opens in template and not xml:
        return HERMES
    if LLAMA3.before in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return LLAMA3
    return JSON


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
    thinking: bool | None = None  # the answer begins within reasoning, may begin with it, has none
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
            } if not rest and name in FORMATS and tools and all(map(_is_tool, tools)):  # fmt: skip
                found = tuple(Tool(*each) for each in tools)
                return cls(FORMATS[name], found, forced, several, thinking, answer)
        raise RequestError("these are no tool calls", code=INVALID)


def _is_tool(value: Any) -> bool:
    match value:
        case [str(name), dict()] if name:
            return True
    return False


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema as it is enforced: of an object. Raises RequestError for one that is not, and for what
    cannot be enforced."""
    given = schema.get("type", "object")
    if given != "object" and given != ["object"]:
        raise RequestError(f'arguments are an object, not of type {json.dumps(given)[:40]}', code=INVALID)
    return enforceable({**schema, "type": "object"})


# ---- as rules


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Of a model's tokenizer, without those that end an answer."""

    ids: Sequence[int] = ()
    by_text: Mapping[str, int] = field(default_factory=dict)

    def any_but(self, *texts: str) -> str:
        """One of them, as a rule's part; empty if there is none."""
        but = {self.by_text[each] for each in texts if each in self.by_text}
        listed = ",".join(str(each) for each in self.ids if each not in but)
        return f"<[{listed}]>" if listed else ""

    def named(self, text: str) -> str:
        """The one with this text, as a rule's part; empty if there is none."""
        found = self.by_text.get(text)
        return "" if found is None else f"<[{found}]>"


def as_lark(calls: Calls, special: SpecialTokens, gap: str) -> str:
    """The rules in llguidance's notation. `gap`: a pattern of the white space between parts of JSON.

    Where rules compete, one that is lazy wins at its last character. So what is text ends where a mark is
    complete, and reasoning where its end is."""
    return "\n".join(_Rules(calls, special, gap).lines()) + "\n"


class _Rules:
    def __init__(self, calls: Calls, special: SpecialTokens, gap: str) -> None:
        self._calls = calls
        self._special = special
        self._gap = gap
        self._free = not calls.forced and calls.answer is None

    def lines(self) -> Iterator[str]:
        anywhere = bool(self._calls.format.opens)
        yield "%llguidance {}"
        yield f"GAP: /{self._gap}/"
        yield r"SPACE: /\s*/"
        yield r"TEXT: /(?s:.*)/"
        yield from self._thinking()
        if self._calls.answer is not None and not self._calls.forced:
            yield f"answer: calls | {self._json(self._calls.answer)}"
        elif self._calls.forced:
            yield "answer: calls"
        else:
            yield from self._after_text() if anywhere else self._or_text()
        yield from self._several()
        yield from self._call()

    def _thinking(self) -> Iterator[str]:
        if self._calls.thinking is None:
            yield "start: answer"
            return
        other, end = self._special.any_but(THOUGHT), self._special.named(THOUGHT)
        unfinished = " | unfinished" if self._free else ""
        yield f"thinking: thought* {_either('thought_end', end and f'TEXT {end}')}"
        yield f"thought_end[lazy]: TEXT {_text(THOUGHT)}"
        yield f"thought: {f'TEXT {other}' if other else 'GAP'}"
        if self._free:
            yield "unfinished: thought* TEXT"
        if self._calls.thinking:
            yield f"start: thinking SPACE answer{unfinished}"
            return
        begin = self._special.named(THINK)
        yield f"think: {_either('think_begin', begin and f'SPACE {begin}')}"
        yield f"think_begin[lazy]: SPACE {_text(THINK)}"
        yield f"start: answer | think (thinking SPACE answer{unfinished})"

    def _other(self) -> str:
        """Special tokens that may stand in a free text."""
        taken = () if self._calls.thinking is None else (THINK,)
        return self._special.any_but(self._calls.format.opens, *taken)

    def _after_text(self) -> Iterator[str]:
        """Text, then calls."""
        form, other = self._calls.format, self._other()
        mark = self._special.named(form.opens)
        yield f"text_opens[lazy]: TEXT {_text(form.opens)}"
        yield f"opens: {_either('text_opens', mark and f'TEXT {mark}')}"
        parts = [f"TEXT {other}"] if other else []
        again = self._calls.several and form.listing is Listing.NEVER
        if again:
            yield f"answer: ({_either(*parts, 'opens called')})* TEXT"
        else:
            free = f"({parts[0]})* " if parts else ""
            yield f"answer: {free}(TEXT | opens called)"

    def _or_text(self) -> Iterator[str]:
        """Calls, or text. What is hidden from the user may stand before both."""
        other = self._other()
        tail = f" ({other} TEXT)*" if other else ""
        lead = f"(SPACE {other})* " if other else ""
        yield f"answer: {lead}(calls | TEXT{tail})"

    def _several(self) -> Iterator[str]:
        """`calls`: one or more, and nothing else; `called`: what follows a mark."""
        form, many = self._calls.format, self._calls.several
        inside = "GAP? call" + (f' (GAP? "{form.between}" GAP? call)*' if many and form.between else "")
        if form.listing is Listing.ALWAYS:
            yield f'called: GAP? "[" {inside} GAP? "]"'
        else:
            close = _either(self._special.named(form.closes), _text(form.closes)) if form.closes else ""
            yield f"called: GAP? call{f' GAP? {close}' if close else ''}"
        if form.opens:
            open_ = self._special.named(form.opens) or _text(form.opens)
            again = f" (GAP? {open_} called)*" if many and form.listing is Listing.NEVER else ""
            yield f"calls: {open_} called{again}"
            return
        before = self._special.named(form.before) if form.before else ""
        lead = f"{before}? " if before else ""
        listed = f' | "[" {inside} GAP? "]"' if form.listing is Listing.SEVERAL and many else ""
        alone = inside if form.listing is Listing.NEVER else "GAP? call"
        yield f"calls: {lead}({alone}{listed})"

    def _call(self) -> Iterator[str]:
        names = [f"call_{index}" for index in range(len(self._calls.tools))]
        yield f"call: {_either(*names)}"
        # What the reader takes for a mark must be one here; elsewhere space is limited as in all JSON.
        gap = r"/[ \t\r\n]*/" if self._free and not self._calls.format.opens else "GAP?"
        yield f"JOIN: {gap}"
        for name, tool in zip(names, self._calls.tools, strict=True):
            key = _text(_encoded(self._calls.format.arguments))
            parts = [
                _text("{"), _text('"name"'), _text(":"), _text(_encoded(tool.name)), _text(","),
                key, _text(":"),
            ]  # fmt: skip
            yield f"{name}_head[lazy]: {' JOIN '.join(parts)}"
            yield f'{name}: {name}_head GAP? {self._json(tool.schema, arguments_schema)} GAP? "}}"'

    def _json(self, schema: Mapping[str, Any], read: Any = enforceable) -> str:
        inside = read(schema) | {"x-guidance": {"whitespace_pattern": self._gap}}
        return f"%json {json.dumps(inside, ensure_ascii=False, allow_nan=False)}"


def _encoded(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text(text: str) -> str:
    """A text, as a rule's part."""
    return json.dumps(text, ensure_ascii=False)


def _either(*parts: str) -> str:
    found = [each for each in parts if each]
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def check_sizes(calls: Calls) -> None:
    """Raises RequestError for schemas that grow too large when their objects are closed."""
    schemas: Iterable[Any] = [arguments_schema(each.schema) for each in calls.tools]
    size = sum(len(json.dumps(each)) for each in schemas)
    if size > MOST_CHARACTERS:
        text = f"the tools' schemas, with their objects closed, have {size:,} characters, {MOST_CHARACTERS:,}"
        raise RequestError(f"{text} are the limit: offer fewer tools", code=INVALID)
