"""Tools prompt: tools and calls told in words, for a chat template that knows none. Pure.

Many models come with such a template. Without this they would not see the tools that they must call.
The tools stand in the system message, or before the first message of the user: not all templates take a
system message, and some have one of their own. Calls in earlier turns become what the model wrote. Their
results become what the user says next: such a template skips roles that it does not know, or refuses
them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from baton.server.turns import RESULTS, SYSTEM, Conversation, text_of
from baton.tool_calls import CallFormat, call_text, calls_text


def with_tools_told(conversation: Conversation, form: CallFormat) -> Conversation:
    """The same for a template that knows no tools."""
    turns = [_with_calls(each, form) for each in _with_results(conversation.messages)]
    if conversation.tools:
        turns = _with_text(turns, tools_text(conversation.tools, form))
    return replace(conversation, messages=turns, tools=None)


def tools_text(tools: Sequence[Any], form: CallFormat) -> str:
    """What a model must know of them."""
    functions = [each.get("function", each) if isinstance(each, dict) else each for each in tools]
    first = functions[0].get("name") if isinstance(functions[0], dict) else None
    example = calls_text(
        form, [call_text(form, str(first), "{...}")]
    )  # small models copy a placeholder
    return (
        "You can call tools. To call one, answer with this and nothing else:\n"
        f"{example}\n"
        "The tools, each with a JSON schema of its arguments:\n"
        f"{json.dumps(functions, ensure_ascii=False)}"
    )


def _with_text(turns: list[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    for roles, before in ((SYSTEM, False), (("user",), True)):
        at = next((i for i, each in enumerate(turns) if each.get("role") in roles), None)
        if at is not None:
            joined = _joined(text, turns[at].get("content"), before=before)
            return [*turns[:at], {**turns[at], "content": joined}, *turns[at + 1 :]]
    return [{"role": "system", "content": text}, *turns]


def _joined(text: str, content: Any, *, before: bool) -> Any:
    if isinstance(content, list):
        part = {"type": "text", "text": f"{text}\n\n" if before else f"\n\n{text}"}
        return [part, *content] if before else [*content, part]
    parts = [text, content or ""] if before else [content or "", text]
    return "\n\n".join(each for each in parts if each)


def _with_results(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Consecutive results, and what the user says behind them, are one turn: roles must alternate."""
    found: list[Mapping[str, Any]] = []
    names: dict[Any, str] = {}  # by the call's id
    results: list[str] = []
    for turn in turns:
        names |= dict(_called(turn))
        if turn.get("role") in RESULTS:
            results.append(_result(turn, names))
            continue
        told = "\n\n".join(results)
        if told and turn.get("role") == "user":
            turn = {**turn, "content": _joined(told, turn.get("content"), before=True)}
        elif told:
            found.append({"role": "user", "content": told})
        results = []
        found.append(turn)
    if results:
        found.append({"role": "user", "content": "\n\n".join(results)})
    return found


def _called(turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Id and name of each of its calls."""
    calls = turn.get("tool_calls")
    for each in calls if isinstance(calls, list) else ():
        match each:
            case {"id": str(id_), "function": {"name": str(name)}}:
                yield id_, name


def _result(turn: Mapping[str, Any], names: Mapping[Any, str]) -> str:
    id_, own = turn.get("tool_call_id"), turn.get("name")
    name = names.get(id_) if isinstance(id_, str) else None
    return f"Result of {name or own or 'the tool'}: {text_of(turn)}"


def _with_calls(turn: Mapping[str, Any], form: CallFormat) -> Mapping[str, Any]:
    calls = turn.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return turn
    texts = [_call_text(each, form, number) for number, each in enumerate(calls)]
    joined = _joined(calls_text(form, texts), turn.get("content"), before=False)
    others = {name: value for name, value in turn.items() if name != "tool_calls"}
    return others | {"content": joined}


def _call_text(call: Any, form: CallFormat, number: int) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return json.dumps(call, ensure_ascii=False)
    given = function.get("arguments")
    arguments = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    return call_text(form, str(function.get("name", "")), arguments or "{}", number)
