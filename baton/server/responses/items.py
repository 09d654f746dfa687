"""Items: what a conversation consists of in the Responses API, and the chat's messages made of it.

    reasoning, message, function_call, function_call    one turn of the assistant
    function_call_output                                one message of role tool
    instructions, first messages of system, developer   one message of role system: templates want one

https://platform.openai.com/docs/api-reference/responses/create
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from baton.server.api_error import SHOWN, ApiError
from baton.server.conversation import MAX_MESSAGES, MAX_PARTS
from baton.server.fields import UNSUPPORTED, Fields

Item = dict[str, Any]
NewId = Callable[[str], str]
"""Makes an id with this prefix."""

Text = Annotated[str, Field(strict=True)]
Id = Annotated[Text, Field(min_length=1, max_length=256)]
KINDS = ("message", "function_call", "function_call_output", "reasoning")
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
OTHERS = "only text, function calls and their outputs are taken"


def _refuse(what: str, kind: object) -> None:
    text = f"{what} of type {str(kind)[:SHOWN]!r} is not supported by this server: {OTHERS}"
    raise ApiError.bad_request(text, "input", UNSUPPORTED)


def _part_kind(value: Any) -> str | None:
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return None
    if kind not in (*TEXTS, "refusal"):
        _refuse("input: a part", kind)
    return "refusal" if kind == "refusal" else "text"


class TextPart(BaseModel):
    """Text of a message, an output or reasoning."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: Text


class RefusalPart(BaseModel):
    """Why there is no text."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["refusal"]
    refusal: Text


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(
        _part_kind, custom_error_type="part", custom_error_message="must be an object with a type"
    ),
]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class MessageItem(Fields):
    """What somebody says."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Id | None = None

    def plain(self, new_id: NewId) -> Item:
        """As the API shows it."""
        assistant = self.role == "assistant"
        kind = "output_text" if assistant else "input_text"
        more: Item = {"annotations": [], "logprobs": []} if assistant else {}
        if isinstance(self.content, str):
            content = [{"type": kind, "text": self.content} | more]
        else:
            content = [
                {"type": "refusal", "refusal": each.refusal}
                if isinstance(each, RefusalPart)
                else {"type": kind, "text": each.text} | more
                for each in self.content
            ]
        return {
            "id": self.id or new_id("msg"),
            "type": "message",
            "role": self.role,
            "status": "completed",
            "content": content,
        }


class CallItem(Fields):
    """A function that the model calls."""

    type: Literal["function_call"]
    call_id: Id
    name: Id
    namespace: Id | None = None
    arguments: Text
    id: Id | None = None

    def plain(self, new_id: NewId) -> Item:
        """As the API shows it."""
        shown = {
            "id": self.id or new_id("fc"),
            "type": "function_call",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
            "status": "completed",
        }
        return shown if self.namespace is None else shown | {"namespace": self.namespace}


class OutputItem(Fields):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    id: Id | None = None

    def plain(self, new_id: NewId) -> Item:
        """As the API shows it."""
        output = self.output if isinstance(self.output, str) else _text(self.output)
        return {
            "id": self.id or new_id("fco"),
            "type": "function_call_output",
            "call_id": self.call_id,
            "output": output,
            "status": "completed",
        }


class ReasoningItem(Fields):
    """What the model thought."""

    unsupported = {"encrypted_content": ((), "send the reasoning's content")}  # noqa: RUF012
    within = "input"

    type: Literal["reasoning"]
    summary: Parts = Field(default_factory=list)
    content: Parts = Field(default_factory=list)
    id: Id | None = None

    def plain(self, new_id: NewId) -> Item:
        """As the API shows it."""
        return {
            "id": self.id or new_id("rs"),
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": _text([e])} for e in self.summary],
            "content": [{"type": "reasoning_text", "text": _text([e])} for e in self.content],
            "status": "completed",
        }


def _kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind is None:
        return "message"
    if kind not in KINDS:
        _refuse("input: an item", kind)
    return str(kind)


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind, custom_error_type="item", custom_error_message="must be an object"),
]
Items = Annotated[list[AnyItem], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Input = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Items, Tag("items")],
    Discriminator(lambda value: "items" if isinstance(value, list) else "text"),
]


def plain_items(given: "str | Sequence[AnyItem]", new_id: NewId) -> list[Item]:
    """The input of a request, each item with an id."""
    if isinstance(given, str):
        return [MessageItem(role="user", content=given).plain(new_id)]
    return [each.plain(new_id) for each in given]


# ---- messages


def messages_of(instructions: str | None, items: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Those of a chat. `items`: as plain() makes them."""
    system, found = [instructions] if instructions else [], list[Item]()
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] in ("system", "developer"):
            if found:
                found.append({"role": "system", "content": _content(item["content"])})
            else:
                system.append(_said(item["content"]))
        elif kind == "message" and item["role"] == "user":
            found.append({"role": "user", "content": _content(item["content"])})
        elif kind == "function_call_output":
            output = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            found.append(output)
        else:
            _add_to_turn(found, item)
    for turn in found:
        if "reasoning_content" in turn:
            turn["reasoning_content"] = "".join(turn["reasoning_content"])
    first = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return first + found


def _add_to_turn(found: list[Item], item: Mapping[str, Any]) -> None:
    """The assistant's turn goes on with the item, or begins with it."""
    turn = found[-1] if found and found[-1]["role"] == "assistant" else None
    silent = turn is not None and turn["content"] is None and "tool_calls" not in turn
    if turn is None or (item["type"] != "function_call" and not silent):
        found.append(turn := {"role": "assistant", "content": None})
    match item["type"]:
        case "reasoning":
            thought = _said(item.get("content") or item["summary"])
            turn.setdefault("reasoning_content", []).append(thought)  # joined at the end, once
        case "function_call":
            name = chat_name(item.get("namespace"), item["name"])
            function = {"name": name, "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        case _:
            turn["content"] = _content(item["content"])


def chat_name(namespace: str | None, name: str) -> str:
    """What a chat calls this function."""
    return name if namespace is None else f"{namespace}__{name}"


def _content(parts: Sequence[Mapping[str, Any]]) -> str | list[Item]:
    """A text where it is one."""
    if len(parts) == 1:
        return _said(parts)
    return [{"type": "text", "text": _said([each])} for each in parts]


def _said(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(each.get("text") or each.get("refusal") or "" for each in parts)


def _text(parts: Sequence[TextPart | RefusalPart]) -> str:
    return "".join(e.refusal if isinstance(e, RefusalPart) else e.text for e in parts)
