"""Tools: the functions that a request offers, and which of them may or must be called.

    tools          [{"type": "function", "function": {"name", "description", "parameters", "strict"}}]
    tool_choice    none: no call        auto: text or calls        required: at least one call
                   {"type": "function", "function": {"name": ...}}: one call of this one
                   {"type": "allowed_tools", "allowed_tools": {"mode": auto or required, "tools": [...]}}
    parallel_tool_calls    false: at most one call

    tool_use(tools, tool_choice, parallel) -> ToolUse -> calls(...) -> Calls -> baton.grammar.tool_calls

Another API surface writes its own tools and choice in these terms, OpenAI's for chats, and reads the
answer with tools_answer.py. A call always fits its tool's schema. Where the schema cannot be enforced,
the request is refused; with `strict: false` the arguments are any object then.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

from baton import grammar
from baton.errors import RequestError
from baton.server.api_error import SHOWN, ApiError
from baton.server.tools_answer import ToolReading
from baton.tool_calls import CallFormat, Calls, Tool, arguments_schema, bare
from baton.tool_calls_marked import check_marked, check_name, parameters_of

LONGEST_NAME = 256
MOST_KNOWN = 1024
"""Schemas whose verdicts are remembered: agents send theirs with every request."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object", "additionalProperties": True}
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}
CHOICES = (
    'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or {"type": '
    '"allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """One of a request's tools. `strict`: None if the request does not say."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool | None
    place: str  # in the request


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that may be called. `forced`: at least one must be; `several`: more than one call may be
    made."""

    tools: tuple[OfferedTool, ...]
    forced: bool
    several: bool

    def reading(self, form: CallFormat, schemas: "KnownSchemas") -> ToolReading:
        """How the calls in its answers are read. Raises ApiError, as calls() does."""
        names = tuple(each.name for each in self.tools)
        if form.marked is None or form.marked.parameter is None:
            return ToolReading(form, names, self.forced)
        enforced = zip(names, schemas.enforced(self.tools, form), strict=True)
        parameters = {name: parameters_of(name, arguments_schema(each)) for name, each in enforced}
        return ToolReading(form, names, self.forced, parameters)

    def calls(
        self,
        form: CallFormat,
        schemas: "KnownSchemas",
        *,
        thinking: bool | None,
        answer: Mapping[str, Any] | None,
    ) -> Calls:
        """What the answer may be. `answer`: the schema of one that calls no tool, None if it is free;
        `thinking`: as in Calls. Raises ApiError for a tool's schema that cannot be enforced."""
        enforced = schemas.enforced(self.tools, form)
        tools = tuple(Tool(e.name, s) for e, s in zip(self.tools, enforced, strict=True))
        return Calls(form, tools, self.forced, self.several, thinking, answer)


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any, *, parallel: bool | None
) -> ToolUse | None:
    """None if no tool may be called. Raises ApiError."""
    if choice in (None, "none", "auto") and (not tools or choice == "none"):
        return None
    mode, names = _chosen(choice)
    if not tools:
        text = "tool_choice asks for a call, but there are no tools: give tools, or leave it out"
        raise ApiError.bad_request(text, "tool_choice")
    offered = [_offered(each, f"tools[{index}]") for index, each in enumerate(tools)]
    by_name: dict[str, OfferedTool] = {}
    for each in offered:
        if each.name in by_name:
            text = f"{each.place} has the name {each.name[:SHOWN]!r} of a tool before it"
            raise ApiError.bad_request(f"{text}: names must differ", "tools")
        by_name[each.name] = each
    for name in names:
        if name not in by_name:
            known = ", ".join(map(repr, by_name))[:200]
            text = f"tool_choice names {name[:SHOWN]!r}, which is none of the tools: {known}"
            raise ApiError.bad_request(text, "tool_choice")
    found = tuple(by_name[each] for each in dict.fromkeys(names)) if names else tuple(offered)
    return ToolUse(found, mode != "auto", parallel is not False and mode != "named")


def _chosen(choice: Any) -> tuple[str, list[str]]:
    """auto, required or named, and the names; without names all tools are meant."""
    match choice:
        case None:
            return "auto", []
        case "auto" | "required":
            return str(choice), []
        case {"type": "function", "function": {"name": str(name)}}:
            return "named", [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode,
                                                         "tools": [_, *_] as allowed}}:  # fmt: skip
            names = [each for each in map(_allowed, allowed) if each]
            if len(names) == len(allowed):
                return mode, names
    raise ApiError.bad_request(f"tool_choice {CHOICES}", "tool_choice")


def _allowed(tool: Any) -> str | None:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    return None


def _offered(tool: Mapping[str, Any], place: str) -> OfferedTool:
    def refused(text: str) -> ApiError:
        return ApiError.bad_request(f"{place}{text}", "tools")

    function = tool.get("function")
    if tool.get("type") != "function":
        raise refused(f".type must be function, got {json.dumps(tool.get('type'))[:SHOWN]}")
    if not isinstance(function, dict):
        raise refused(".function must be an object with a name")
    name, parameters, strict = (function.get(key) for key in ("name", "parameters", "strict"))
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise refused(f".function.name must be a text of 1 to {LONGEST_NAME} characters")
    if parameters is not None and not isinstance(parameters, dict):
        raise refused(".function.parameters must be a JSON schema, an object")
    if strict is not None and not isinstance(strict, bool):
        raise refused(".function.strict must be true or false")
    # OpenAI: a function without parameters has none
    return OfferedTool(name, NO_ARGUMENTS if parameters is None else parameters, strict, place)


def answer_schema(written: str, param: str) -> Mapping[str, Any] | None:
    """Of JSON, which a grammar describes that the field `param` asks for; None without one. Raises
    ApiError for any other grammar."""
    answer = json_schema_in(written)
    if answer is not None or not written:
        return answer
    text = (
        f"{param} and tools exclude each other, unless it describes JSON: leave tools out, or give "
        "tool_choice none"
    )
    raise ApiError.bad_request(text, param)


def json_schema_in(written: str) -> Mapping[str, Any] | None:
    """Of the JSON that a grammar describes; None for any other, and without one."""
    match json.loads(written or "null"):
        case {"kind": "json_schema", "schema": dict(schema)}:
            return schema
        case {"kind": "json_object"}:
            return {"type": "object"}
    return None


class KnownSchemas:
    """Which schemas can be enforced. `check` compiles a grammar or raises RequestError."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check
        self._known: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._lock = Lock()  # requests are read in several threads

    def enforced(self, tools: Sequence[OfferedTool], form: CallFormat) -> list[Mapping[str, Any]]:
        """What the grammar takes of each: its schema without descriptions. Raises ApiError."""
        schemas = [bare(each.parameters) for each in tools]
        _check_total(tools, schemas)  # before any is compiled, which takes a second at worst
        return [self._one(*each, form) for each in zip(tools, schemas, strict=True)]

    def _one(
        self, tool: OfferedTool, schema: Mapping[str, Any], form: CallFormat
    ) -> Mapping[str, Any]:
        if form.marked is not None or form.channels:
            try:
                check_name(tool.name)
            except RequestError as error:
                text = f"{tool.place}.function.name: {error}"
                raise ApiError.bad_request(text, "tools", error.code) from error
        refusal = self._verdict(schema)
        if refusal is None and form.marked is not None:
            try:
                check_marked(form.marked, tool.name, arguments_schema(schema))
            except RequestError as error:
                refusal = _Refusal(str(error), error.code)
        if refusal is None:
            return schema
        if tool.strict is False:
            return ANY_OBJECT
        text = (
            f"{tool.place}.function.parameters: {refusal.text}; or give the tool strict: false, then its "
            "arguments are any JSON object"
        )
        raise ApiError.bad_request(text, "tools", refusal.code)

    def _verdict(self, schema: Mapping[str, Any]) -> "_Refusal | None":
        """None: it can be enforced."""
        key = sha256(json.dumps(schema).encode()).digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        verdict: _Verdict = None
        try:
            arguments_schema(schema)
            self._check(grammar.json_schema({**schema, "type": "object"}))
        except RequestError as error:
            verdict = _Refusal(str(error), error.code)
        with self._lock:
            self._known[key] = verdict
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return verdict


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a schema cannot be enforced."""

    text: str
    code: str | None


_Verdict = _Refusal | None


def _check_total(tools: Sequence[OfferedTool], schemas: Sequence[Any]) -> None:
    """A schema that alone is too large is not counted: it is judged without being compiled."""
    sizes = [_size(each) for each in schemas]
    total = sum(each for each in sizes if each <= grammar.LARGEST)
    if total > grammar.LARGEST:
        text = f"the schemas of these {len(tools)} tools have {total} bytes without descriptions"
        limit = f"{grammar.LARGEST} are the limit: offer fewer tools, or smaller schemas"
        raise ApiError.bad_request(f"{text}, {limit}", "tools", grammar.INVALID)


def _size(schema: Any) -> int:
    """Bytes, as the grammar has it."""
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode(errors="surrogatepass"))
