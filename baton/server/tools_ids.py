"""Tools ids: ids of calls as a template shows them to its model, where the model wrote them itself. Pure.

Kimi K2 names a call by its function and its number in the conversation (functions.weather:0), and its
template prints the id of each call. A client has ids of this server's, or its own. So the model would
read other names than it has written, in calls and in results.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def numbered(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With such ids. A result keeps the id of a call that is not there."""
    known: dict[Any, str] = {}
    count = 0
    found: list[Mapping[str, Any]] = []
    for turn in messages:
        calls = turn.get("tool_calls")
        if isinstance(calls, list):
            named = []
            for call in calls:
                function = call.get("function") if isinstance(call, dict) else None
                if not isinstance(function, dict):
                    named.append(call)
                    continue
                own = f"functions.{function.get('name', '')}:{count}"
                count += 1
                if isinstance(call.get("id"), str):
                    known[call["id"]] = own
                named.append(call | {"id": own})
            turn = {**turn, "tool_calls": named}
        elif isinstance(id_ := turn.get("tool_call_id"), str) and id_ in known:
            turn = {**turn, "tool_call_id": known[id_]}
        found.append(turn)
    return found
