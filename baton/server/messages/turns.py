"""Turns: messages as Anthropic's API has them, and the chat's messages made of them.

    system                                one message of role system
    user: tool_result, text               messages of role tool, then one of role user
    assistant: thinking, text, tool_use   one message: reasoning_content, content, tool_calls

If the last message is one of the assistant that ends with text, the answer goes on with it.
https://docs.claude.com/en/api/messages
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from baton.server.api_error import SHOWN, ApiError
from baton.server.conversation import MAX_MESSAGES, MAX_PARTS
from baton.server.fields import UNSUPPORTED, Fields
from baton.server.sse import json_of

Text = Annotated[str, Field(strict=True)]
Id = Annotated[Text, Field(min_length=1, max_length=256)]
KINDS = ("text", "thinking", "tool_use", "tool_result")
ALLOWED = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}
FAILED = "Error: "
"""Before the content of a tool_result with is_error: chats have no field for it."""


def _kind(value: Any) -> str | None:
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return None
    if kind not in KINDS:
        text = (
            f"messages: a block of type {kind[:SHOWN]!r} is not supported by this server: "
            "only text, thinking and tools are taken"
        )
        raise ApiError.bad_request(text, "messages", UNSUPPORTED)
    return kind


class TextBlock(BaseModel):
    """A text."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: Text


class ThinkingBlock(BaseModel):
    """What the model thought. The signature is not read."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(BaseModel):
    """A call."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["tool_use"]
    id: Id
    name: Id
    input: dict[str, Any]


Texts = Annotated[
    Annotated[Text, Tag("string")]
    | Annotated[
        list[
            Annotated[
                Annotated[TextBlock, Tag("text")],
                Discriminator(
                    lambda value: "text" if _kind(value) == "text" else None,
                    custom_error_type="block",
                    custom_error_message="must be a block of type text",
                ),
            ]
        ],
        Field(max_length=MAX_PARTS, fail_fast=True),
        Tag("blocks"),
    ],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "string"),
]


class ToolResultBlock(Fields):
    """What a call came to."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Texts = ""
    is_error: Annotated[bool, Field(strict=True)] = False


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        _kind, custom_error_type="block", custom_error_message="must be an object with a type"
    ),
]
Content = Annotated[
    Annotated[Text, Tag("string")]
    | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True), Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "string"),
]


class Turn(Fields):
    """What one side says."""

    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _blocks_of_the_role(self) -> "Turn":
        for block in self.blocks:
            if block.type not in ALLOWED[self.role]:
                raise ValueError(
                    f"a message of role {self.role} has no blocks of type {block.type}"
                )
        return self

    @property
    def blocks(self) -> Sequence[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]:
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content

    @property
    def goes_on(self) -> bool:
        """Is it a beginning of the answer?"""
        if self.role != "assistant" or not self.blocks:
            return False
        return isinstance(self.blocks[-1], TextBlock)


Turns = Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class Chat:
    """The messages of a chat, as they come together."""

    most: ClassVar[int] = MAX_MESSAGES

    def __init__(self, system: str | Sequence[TextBlock] | None) -> None:
        self.messages: list[dict[str, Any]] = []
        text = system if isinstance(system, str) else "\n\n".join(e.text for e in system or ())
        if text:
            self.messages.append({"role": "system", "content": text})

    def add(self, turn: Turn) -> None:
        if turn.role == "assistant":
            self.messages.append(_assistant(turn))
            return
        for each in turn.blocks:
            if isinstance(each, ToolResultBlock):
                said = each.content
                text = said if isinstance(said, str) else "\n".join(e.text for e in said)
                content = FAILED + text if each.is_error else text
                call = {"role": "tool", "tool_call_id": each.tool_use_id, "content": content}
                self.messages.append(call)
        texts = [each for each in turn.blocks if isinstance(each, TextBlock)]
        if texts or not turn.blocks:
            self.messages.append({"role": turn.role, "content": _content(texts)})


def _assistant(turn: Turn) -> dict[str, Any]:
    texts = [each for each in turn.blocks if isinstance(each, TextBlock)]
    thoughts = [each.thinking for each in turn.blocks if isinstance(each, ThinkingBlock)]
    calls = [
        {
            "id": each.id,
            "type": "function",
            "function": {"name": each.name, "arguments": json_of(each.input)},
        }
        for each in turn.blocks
        if isinstance(each, ToolUseBlock)
    ]
    silent = calls and not texts
    message: dict[str, Any] = {"role": "assistant", "content": None if silent else _content(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _content(texts: Sequence[TextBlock]) -> str | list[dict[str, Any]]:
    """A text where it is one."""
    if len(texts) < 2:
        return "".join(each.text for each in texts)
    return [{"type": "text", "text": each.text} for each in texts]
