"""Namespaces: groups of functions among the tools, as coding agents send them; a chat has one flat list.

    {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "close"}]}

The chat's function is agents__close; a call of it has name `close` and namespace `agents` again.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from baton.server.api_error import ApiError
from baton.server.responses.items import Item, chat_name

Named = Mapping[str, tuple[str, str]]
"""By the function's name in the chat: its namespace, and its name there."""


def _within(tool: Mapping[str, Any]) -> list[Item]:
    """The tools of a namespace. Raises ApiError."""
    name, tools = tool.get("name"), tool.get("tools")
    if not isinstance(name, str) or not name:
        raise ApiError.bad_request("tools: a namespace must have a name", "tools")
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        text = f"tools: the namespace {name[:80]!r} must have a list of tools"
        raise ApiError.bad_request(text, "tools")
    return tools


def flat(tools: Iterable[Item]) -> Iterator[Item]:
    """Tools without namespaces: theirs are renamed. Raises ApiError."""
    for tool in tools:
        if tool.get("type") != "namespace":
            yield tool
            continue
        for each in _within(tool):
            name = each.get("name")
            yield each | ({"name": chat_name(tool["name"], name)} if isinstance(name, str) else {})


def named(tools: Iterable[Item]) -> Named:
    """Which functions of the chat are of a namespace. `tools`: as flat() has taken them."""
    groups = (each for each in tools if each.get("type") == "namespace")
    return {
        chat_name(group["name"], each["name"]): (group["name"], each["name"])
        for group in groups
        for each in group["tools"]
    }
