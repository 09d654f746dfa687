"""Pieces: what a chat answers, for APIs that have an object of its own for each kind of it. Pure.

    chunk or message of a chat  -> pieces -> events and objects of /v1/responses and /v1/messages

Both APIs are translations: a request becomes a ChatRequest, and what the chat answers becomes theirs. So
templates, grammars, tools, reasoning, limits and errors are the chat's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.errors import RequestError
from baton.server.api_error import ApiError, from_request_error


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """What it answers. `logprobs`: as a chat has them."""

    text: str
    logprobs: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A part of a tool call. The first part of call `index` has its id and name."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


Piece = Reasoning | Content | Call


def pieces_of(said: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None) -> list[Piece]:
    """Of a delta, or of a whole message: reasoning first, calls last."""
    found: list[Piece] = []
    if reasoning := said.get("reasoning_content"):
        found.append(Reasoning(reasoning))
    scores = (logprobs or {}).get("content") or ()
    if (text := said.get("content")) or scores:
        found.append(Content(text or "", scores))
    for place, call in enumerate(said.get("tool_calls") or ()):
        function = call.get("function") or {}
        found.append(
            Call(
                call.get("index", place),
                function.get("arguments") or "",
                call.get("id") or "",
                function.get("name") or "",
            )
        )
    return found


_QUOTES = ("'(?:\\\\.|[^'\\\\])*(?:'|$)", r'"(?:\\.|[^"\\])*(?:"|$)', "`[^`]*(?:`|$)")
QUOTED = re.compile(rf"(?<!\w)(?:{'|'.join(_QUOTES)})")
"""What a client sent stands in quotes in a message, maybe cut off. An apostrophe in a word is none."""


def renamed(error: ApiError | RequestError, names: Mapping[str, str]) -> ApiError:
    """The error with the names that fields have in another API. `names`: by those of a chat. What the
    client sent keeps its words: what is quoted, and the steps of a path."""
    if isinstance(error, RequestError):
        error = from_request_error(error)
    if error.status != 400:
        return error
    words = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    field = re.compile(rf"(?<![\w/.])({words})(?![\w/])")
    parts, at = list[str](), 0
    for quoted in (*QUOTED.finditer(error.message), None):
        end = len(error.message) if quoted is None else quoted.start()
        parts.append(field.sub(lambda found: names[found[0]], error.message[at:end]))
        if quoted is not None:
            parts.append(quoted[0])
            at = quoted.end()
    message = "".join(parts)
    param = error.param if error.param is None else names.get(error.param, error.param)
    return replace(error, message=message, param=param)
