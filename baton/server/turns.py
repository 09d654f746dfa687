"""Turns: messages in the form that a chat template wants. Pure; templates.py renders them.

    content      A template that goes through the parts of a content gets parts, one that prints it gets
                 a text. One that looks whether it is a text takes both.
    arguments    of tool calls are objects for a template, though clients send them as JSON. Templates
                 that join them to texts get the JSON.
    instructions of role developer have role system where the template does not know the former. All are
                 one message at the beginning where it refuses others, or leaves out what they say.
    nulls        are left out; so is the content of an assistant that only calls tools, but not of others

The variables are those of transformers' apply_chat_template.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Any

from jinja2 import nodes

from baton import finite
from baton.errors import RequestError

REASONING = ("reasoning_content", "thinking", "reasoning")
ASSISTANT = "assistant"
DEVELOPER = "developer"
SYSTEM = ("system", DEVELOPER)
"""Roles of instructions."""
RESULTS = ("tool", "function")
"""Roles of what came of a call."""
SILENT = {"content": ""}
PICKS = frozenset({"selectattr", "rejectattr", "map", "select", "reject", "groupby"})
"""Filters that go through the items of what they are given."""
MOST_ARGUMENTS = 65_536
"""Brackets, commas and colons in the arguments of all calls: JSON takes a hundred times its size."""
MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""transformers' own; its space shows whether a template strips contents."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The variables of a template."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    tools: Sequence[Any] | None = None
    continue_final_message: bool = False
    documents: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


class ContentForm(Enum):
    """What a template wants a content to be."""

    TEXT = auto()
    PARTS = auto()
    EITHER = auto()


def content_form(tree: nodes.Template) -> ContentForm:
    """Read off a template."""
    names = _content_names(tree)

    def goes_through(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Filter) and node.name in PICKS:
            return _is_content(node.node, names) or goes_through(node.node)
        return _is_content(node, names)

    loops = any(goes_through(each.iter) for each in tree.find_all(nodes.For))
    picks = (each for each in tree.find_all(nodes.Filter) if each.name in PICKS)
    if not loops and not any(goes_through(each) for each in picks):
        return ContentForm.TEXT
    looks = any(
        each.name == "string" and _is_content(each.node, names)
        for each in tree.find_all(nodes.Test)
    )
    return ContentForm.EITHER if looks else ContentForm.PARTS


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that hold a content, arguments of macros among them."""
    macros = {each.name: each for each in tree.find_all(nodes.Macro)}
    assigned = list(tree.find_all(nodes.Assign))
    calls = [
        (each, macros[each.node.name])
        for each in tree.find_all(nodes.Call)
        if isinstance(each.node, nodes.Name) and each.node.name in macros
    ]
    names: set[str] = set()
    while True:
        found = {
            each.target.name
            for each in assigned
            if isinstance(each.target, nodes.Name) and _is_content(each.node, names)
        }
        for call, macro in calls:
            pairs = zip(macro.args, call.args, strict=False)
            found |= {name.name for name, given in pairs if _is_content(given, names)}
            found |= {each.key for each in call.kwargs if _is_content(each.value, names)}
        if found <= names:
            return names
        names |= found


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
        case nodes.Name(name=name):
            return name in names
        case nodes.CondExpr(expr1=one, expr2=other):
            return _is_content(one, names) or _is_content(other, names)
        case nodes.Or(left=one, right=other) | nodes.And(left=one, right=other):
            return _is_content(one, names) or _is_content(other, names)
        case nodes.Filter(node=inner, name="default" | "d" | "list" | "reverse"):
            return _is_content(inner, names)
    return False


def knows_developer(tree: nodes.Template) -> bool:
    """Does a template name this role?"""
    return any(each.value == DEVELOPER for each in tree.find_all(nodes.Const))


# ---- messages


def arrangements(
    messages: Sequence[Mapping[str, Any]], *, developer: bool
) -> Iterator[Sequence[Mapping[str, Any]]]:
    """The messages as they are; then, if that is something else, with all instructions in one message at
    their beginning. `developer`: the template knows this role."""
    if not developer:
        messages = [
            {**each, "role": "system"} if each.get("role") == DEVELOPER else each
            for each in messages
        ]
    yield messages
    told = [each for each in messages if each.get("role") in SYSTEM]
    if told and (len(told) > 1 or told[0] is not messages[0]):
        text = "\n\n".join(filter(None, map(text_of, told)))
        others = [each for each in messages if each.get("role") not in SYSTEM]
        yield [{"role": told[0]["role"], "content": text}, *others]


def told_in(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Does a rendered text have all that instructions say? Templates may strip it."""
    told = (text_of(each).strip() for each in messages if each.get("role") in SYSTEM)
    return all(each in text for each in told)


def variants(
    messages: Sequence[Mapping[str, Any]], form: ContentForm
) -> Iterator[list[dict[str, Any]]]:
    """The messages as a template most likely wants them, then as others do: with JSON for the arguments
    of calls, with an empty content where there is none. Raises RequestError."""
    _check_arguments(messages)
    sent = [_plain(each, form) for each in messages]
    parsed = [_with_objects(each) for each in sent]
    for turns in [parsed] if parsed == sent else [parsed, sent]:
        yield turns
        silent = [SILENT | each if each.get("role") == ASSISTANT else each for each in turns]
        if silent != turns:
            yield silent


def _plain(message: Mapping[str, Any], form: ContentForm) -> dict[str, Any]:
    """Without fields that are null, with a model's reasoning under each of the names it has had."""
    turn = {name: value for name, value in message.items() if value is not None}
    if turn.get("tool_calls") == []:  # templates look whether there is such a field
        del turn["tool_calls"]
    given = [turn[name] for name in REASONING if name in turn]
    if given:
        turn = {"thinking": given[0], **turn, "reasoning_content": given[0]}
    if "content" in message and message["content"] is None and turn.get("role") != ASSISTANT:
        turn["content"] = ""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [_part(each) for each in content]
        joined = form is ContentForm.TEXT
        turn["content"] = "".join(each["text"] for each in parts) if joined else parts
    elif isinstance(content, str) and form is ContentForm.PARTS:
        turn["content"] = [{"type": "text", "text": content}]
    return turn


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a refusal says is text."""
    if part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal") or part.get("text") or ""}
    return dict(part)


def _calls(turn: Mapping[str, Any]) -> list[Any]:
    calls = turn.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    return function.get("arguments") if isinstance(function, dict) else None


def _check_arguments(messages: Sequence[Mapping[str, Any]]) -> None:
    texts = (_arguments(call) for turn in messages for call in _calls(turn))
    elements = sum(
        sum(map(text.count, ("[", "{", ",", ":"))) for text in texts if isinstance(text, str)
    )
    if elements > MOST_ARGUMENTS:
        text = (
            f"the arguments of all tool_calls hold more than {MOST_ARGUMENTS:,} elements: send less"
        )
        raise RequestError(text, param="messages")


def _with_objects(turn: dict[str, Any]) -> dict[str, Any]:
    calls = _calls(turn)
    return turn | {"tool_calls": [_with_object(each) for each in calls]} if calls else turn


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str) and arguments is not None:
        return call
    try:
        found = finite.loads(arguments) if arguments and arguments.strip() else {}
    except (ValueError, RecursionError):
        return call  # the model's own mistake: it is shown as it was made
    return call | {"function": function | {"arguments": found}} if isinstance(found, dict) else call


# ---- templates that take one call a turn


def with_one_text(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What turns that call tools say stands behind their reasoning: a template of channels (gpt-oss)
    refuses both, and shows either in the same place."""
    return [_with_one_text(each) for each in messages]


def _with_one_text(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    thought = next((turn[name] for name in REASONING if turn.get(name)), None)
    said = text_of(turn)
    if not _calls(dict(turn)) or not isinstance(thought, str) or not said:
        return turn
    others = {name: value for name, value in turn.items() if name not in (*REASONING, "content")}
    return others | {REASONING[0]: f"{thought}\n{said}"}


def one_call_each(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Several calls of a turn become a turn each, with its results behind it. A result belongs to the
    call that it names by id, any other to the first call that has none."""
    found: list[Mapping[str, Any]] = []
    at = 0
    while at < len(messages):
        turn = messages[at]
        calls = _calls(turn)
        at += 1
        if len(calls) < 2:
            found.append(turn)
            continue
        begin = at
        while at < len(messages) and messages[at].get("role") in RESULTS:
            at += 1
        found.extend(_parted(turn, calls, messages[begin:at]))
    return found


def _parted(
    turn: Mapping[str, Any], calls: Sequence[Any], results: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    own: list[list[Mapping[str, Any]]] = [[] for _ in calls]
    places = {
        each["id"]: place
        for place, each in enumerate(calls)
        if isinstance(each, dict) and isinstance(each.get("id"), str)
    }
    others: list[Mapping[str, Any]] = []
    for each in results:
        id_ = each.get("tool_call_id")
        place = places.get(id_) if isinstance(id_, str) else None
        (others if place is None else own[place]).append(each)
    waiting = iter(others)
    for mine in own:
        if not mine:
            mine.extend(islice(waiting, 1))
    own[-1].extend(waiting)
    said = {*REASONING, "content"}  # once
    again = {name: value for name, value in turn.items() if name not in said}
    for place, call in enumerate(calls):
        yield {**(again if place else turn), "tool_calls": [call]}
        yield from own[place]


# ---- the last message goes on


def text_of(message: Mapping[str, Any]) -> str:
    """All that it says in `content`."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(each["text"] for each in content or () if isinstance(each.get("text"), str))


def marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With MARK at the end of the last message's text. Raises RequestError if it has none."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        return [*messages[:-1], last | {"content": content + MARK}]
    texts = [i for i, each in enumerate(content or ()) if isinstance(each.get("text"), str)]
    if not texts:
        raise RequestError(
            "continue_final_message: the last message has no text to go on with", param="messages"
        )
    assert isinstance(content, list)
    parts = [dict(each) for each in content]
    parts[texts[-1]]["text"] += MARK
    return [*messages[:-1], last | {"content": parts}]


def up_to_mark(text: str) -> str:
    """The rendered text up to the mark. Raises RequestError if the template left it out."""
    at = text.rfind(MARK.strip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message as it is",
            param="messages",
        )
    whole = text.startswith(MARK, at)
    return text[:at] if whole else text[:at].rstrip()
