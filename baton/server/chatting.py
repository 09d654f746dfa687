"""Chatting: conversations as they are asked over HTTP, and texts for the tokenizer. See protocol.py."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from baton.params import MAX_LOGPROBS, Limits
from baton.server.faults import Fault
from baton.server.fields import Bool, Int, Text, TokenId
from baton.server.protocol import Asked, Generation, Loose

MAX_MESSAGES = 16_384


class Part(Loose):
    """A part of a message: text."""

    type: Literal["text"]
    text: Text


Parts = Annotated[list[Part], Field(fail_fast=True)]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class ChatMessage(Loose):
    """One turn."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Content | None = None
    name: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("content may be left out by an assistant alone")
        return self


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As templates take them: contents are texts."""
    found = []
    for message in messages:
        turn = message.model_dump(exclude_none=True)
        content = turn.get("content", "")
        parts = content if isinstance(content, list) else [{"text": content}]
        found.append(turn | {"content": "".join(part["text"] for part in parts)})
    return found


class ChatRequest(Asked):
    """Answer this conversation."""

    messages: Messages
    max_tokens: Int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Int | None = Field(None, ge=1, lt=2**31)
    logprobs: Bool | None = False
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Any = None
    echo: Any = Field(None, description="For completions only.")

    def conversation(self) -> list[dict[str, Any]]:
        """For the template."""
        return plain_messages(self.messages)

    def generation(self, limits: Limits) -> Generation:
        """Raises Fault or RequestError."""
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise Fault.bad_request(
                "max_tokens and max_completion_tokens differ: give one", "max_tokens"
            )
        if self.echo:
            raise Fault.bad_request("echo is for completions only", "echo")
        if self.top_logprobs is not None and not self.logprobs:
            raise Fault.bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise Fault.bad_request(
                "tool_choice must be none or auto: calls cannot be enforced here",
                "tool_choice",
                "unsupported",
            )
        offered = self.tools if self.tool_choice != "none" else None
        return self.to_generation(
            limits,
            prompts=(),
            max_tokens=both.pop() if both else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else -1,
            prompt_logprobs=-1,
            echo=False,
            add_special_tokens=False,
            tools=offered,
        )


class TokenizeRequest(Loose):
    """A text, or a conversation."""

    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Bool = True
    add_generation_prompt: Bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """For the template."""
        return plain_messages(self.messages or ())


class DetokenizeRequest(Loose):
    """Token ids."""

    tokens: list[TokenId] = Field(max_length=1 << 20, fail_fast=True)
