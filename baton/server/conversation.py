"""Conversation: the messages of a chat and all that goes with them into the chat template.

    ConversationFields  -> conversation() -> Conversation -> templates.py

/v1/chat/completions and /tokenize share these fields, so both count the same tokens.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)

from baton.server.api_error import ApiError
from baton.server.fields import Fields
from baton.server.turns import Conversation

MAX_MESSAGES = 16_384
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_VARIABLES = 64
OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
                  "chat_template", "tokenize"})  # fmt: skip
"""Variables of a template that have fields of their own."""
SILENT_ROLES = frozenset({"assistant", "tool", "function"})
"""May have no content."""

Text = Annotated[str, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Part(BaseModel):
    """A part of a message: text, or why none is given."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _is_text(self) -> "Part":
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type text must have a text")
        return self


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class ChatMessage(BaseModel):
    """One turn. Its template also sees the fields that are not checked here: reasoning_content and others
    of models to come."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Content | None = None
    name: Text | None = None
    tool_calls: Objects | None = None
    tool_call_id: Text | None = None
    _given: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, check: ModelWrapValidatorHandler["ChatMessage"]) -> "ChatMessage":
        message = check(given)
        message._given = given
        return message

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role not in SILENT_ROLES:
            raise ValueError("only messages of the assistant and of tools may have no content")
        return self

    @property
    def turn(self) -> dict[str, Any]:
        """For a template: as it was given."""
        return self._given


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class ConversationFields(Fields):
    """What the template of a chat sees."""

    messages: Messages | None = None
    tools: Objects | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Any = None
    documents: Objects | None = None
    add_generation_prompt: Bool = Field(True, description="Does the assistant's turn begin?")
    continue_final_message: Bool = Field(
        False, description="The answer goes on with the last message instead of a new one."
    )
    add_special_tokens: Bool | None = Field(
        None, description="Of the tokenizer: true for texts, false for conversations."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=MAX_VARIABLES, description="More variables of the template."
    )
    reasoning_effort: Text | None = Field(None, max_length=64, description="One of them.")

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template may offer."""
        return self.tools if self.tool_choice != "none" else None

    @property
    def adds_special_tokens(self) -> bool:
        """Of the tokenizer. A template writes them itself."""
        given = self.add_special_tokens
        return self.messages is None if given is None else given

    def conversation(self) -> Conversation:
        """For the template. Raises ApiError."""
        continues = self.continue_final_message
        if continues and self.add_generation_prompt and "add_generation_prompt" in self.given:
            text = "continue_final_message and add_generation_prompt exclude each other"
            raise ApiError.bad_request(text, "continue_final_message")
        variables = dict(self.chat_template_kwargs or {})
        if taken := variables.keys() & OURS:
            text = f"chat_template_kwargs cannot hold {min(taken)}, which is a field of its own"
            raise ApiError.bad_request(text, "chat_template_kwargs")
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        return Conversation(
            [message.turn for message in self.messages or ()],
            self.add_generation_prompt and not continues,
            self.offered_tools,
            continue_final_message=continues,
            documents=self.documents,
            variables=variables,
        )

    @property
    def given(self) -> set[str]:
        """The fields that the request has, other than null."""
        return self.model_fields_set
