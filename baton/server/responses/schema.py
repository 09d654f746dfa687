"""Schema: a request of the Responses API, field by field, and the chat made of it.

Fields that chats have beside OpenAI's (top_k, seed, guided_json, chat_template_kwargs, ...) are theirs
here, too: done, or refused by name. Those that say who asks, or how, have no effect, as there.
https://platform.openai.com/docs/api-reference/responses/create
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from baton.params import MAX_LOGPROBS
from baton.server.api_error import ApiError
from baton.server.conversation import MAX_TOOLS
from baton.server.fields import LEAVE_OUT, UNSUPPORTED, Fields, Refusals, at_most
from baton.server.responses.items import Input, Item, chat_name, messages_of
from baton.server.responses.namespaces import Named, flat, named
from baton.server.schema import Bool, Int, Number, Text

LOGPROBS = "message.output_text.logprobs"
FUNCTIONS_ONLY = "only functions are"
MOST_METADATA = 16

RESPONSES: Refusals = {
    "background": ((False,), "wait for the answer, or stream it"), "background_options": ((), LEAVE_OUT),
    "conversation": ((), "use previous_response_id"), "prompt": ((), "use instructions and input"),
    "context_management": ((), LEAVE_OUT), "moderation": ((), LEAVE_OUT),
    "truncation": (("disabled",), "send a shorter conversation"),
    # of a chat
    "n": ((1,), "send several requests"), "best_of": ((1,), LEAVE_OUT), "messages": ((), "use input"),
    "response_format": ((), "use text.format"), "max_tokens": ((), "use max_output_tokens"),
    "max_completion_tokens": ((), "use max_output_tokens"),
    "reasoning_effort": ((), "use reasoning.effort"),
    "logprobs": ((False,), f"use include: [{LOGPROBS}]"), "include_reasoning": ((True,), LEAVE_OUT),
    "verbosity": (("medium",), LEAVE_OUT), "add_generation_prompt": ((True,), LEAVE_OUT),
    "continue_final_message": ((False,), LEAVE_OUT), "return_token_ids": ((False,), LEAVE_OUT),
    "return_tokens_as_token_ids": ((False,), LEAVE_OUT),
}  # fmt: skip
INCLUDED = {
    LOGPROBS,
    "reasoning.encrypted_content",  # reasoning comes in the clear
    # of tools that do not exist here
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "web_search_call.action.sources", "web_search_call.results",
}  # fmt: skip
NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""What a chat's fields are called here."""

Metadata = Annotated[
    dict[str, Annotated[Text, Field(max_length=512)]],
    Field(max_length=MOST_METADATA),
    at_most(MOST_METADATA, "pairs"),
]


LONGEST_LABEL = 512
"""Characters of what a response only repeats."""


class TextFormat(Fields):
    """The format that the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text = "answer"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = None
    description: Text | None = None


class TextConfig(Fields):
    """How the text is."""

    unsupported: ClassVar[Refusals] = {"verbosity": (("medium",), LEAVE_OUT)}
    within: ClassVar[str] = "text"

    format: TextFormat | None = None


class ReasoningConfig(Fields):
    """How the model thinks."""

    unsupported: ClassVar[Refusals] = {
        name: (("auto",), "reasoning comes whole, as the content of its item")
        for name in ("summary", "generate_summary")
    }
    within: ClassVar[str] = "reasoning"

    effort: Text | None = Field(None, max_length=64, description="A variable of the template.")


class ResponsesStreamOptions(Fields):
    """Options of a stream. Nothing obfuscates the sizes of events here."""

    unsupported: ClassVar[Refusals] = {"include_obfuscation": ((False,), LEAVE_OUT)}
    within: ClassVar[str] = "stream_options"


class ResponsesRequest(Fields):
    """/v1/responses."""

    unsupported: ClassVar[Refusals] = RESPONSES

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    input: Input = Field(description="A text, or items: messages, function calls and outputs.")
    instructions: Text | None = None
    previous_response_id: Text | None = Field(
        None, max_length=256, description="The conversation goes on after that response."
    )
    store: Bool | None = Field(True, description="In memory, for previous_response_id.")
    max_output_tokens: Int | None = Field(None, ge=1, lt=2**31)
    temperature: Number | None = Field(None, ge=0, le=2, description="0: greedy.")
    top_p: Number | None = Field(None, gt=0, le=1)
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Any = None
    parallel_tool_calls: Bool | None = None
    max_tool_calls: Int | None = Field(
        None, ge=1, description="Of built-in tools, which do not exist here."
    )
    include: list[Text] | None = Field(None, max_length=64, description=f"{LOGPROBS} is known.")
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: Bool | None = False
    stream_options: ResponsesStreamOptions | None = None
    metadata: Metadata | None = None
    user: Text | None = Field(None, max_length=LONGEST_LABEL)
    safety_identifier: Text | None = Field(None, max_length=LONGEST_LABEL)
    prompt_cache_key: Text | None = Field(None, max_length=LONGEST_LABEL)
    service_tier: Any = None
    _given: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(
        cls, given: Any, check: ModelWrapValidatorHandler["ResponsesRequest"]
    ) -> "ResponsesRequest":
        request = check(given)
        request._given = given
        return request

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def chat(self, items: Sequence[Item]) -> dict[str, Any]:
        """The chat that it asks for, after a conversation of these items, its own input included. Raises
        ApiError."""
        if unknown := sorted(set(self.include or ()) - INCLUDED):
            raise ApiError.bad_request(f"include: {unknown[0][:80]!r} is not known", "include")
        if self.top_logprobs and not self.wants_logprobs:
            text = f"top_logprobs needs include: [{LOGPROBS}]"
            raise ApiError.bad_request(text, "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError.bad_request("stream_options needs stream: true", "stream_options")
        ours = type(self).model_fields.keys()
        more = {name: value for name, value in self._given.items() if name not in ours}
        tools, choice = self._tools()
        form = self.text.format if self.text else None
        found = more | {
            "model": self.model,
            "messages": messages_of(self.instructions, items),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": bool(self.stream),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": None if form is None else _chat_format(form),
            "tools": tools or None,
            "tool_choice": choice if tools else None,
            "parallel_tool_calls": self.parallel_tool_calls if tools else None,
        }
        if self.wants_logprobs:
            found |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {name: value for name, value in found.items() if value is not None}

    def _tools(self) -> tuple[list[Item], Any]:
        """As a chat has them: the tools that may be called, and the choice. Raises ApiError."""
        tools = [_chat_tool(each) for each in flat(self.tools or ())]
        choice = self.tool_choice
        names = {each["function"]["name"] for each in tools}
        if choice is None or isinstance(choice, str):
            if choice not in (None, "none", "auto", "required"):
                text = "tool_choice must be none, auto, required or an object"
                raise ApiError.bad_request(text, "tool_choice")
            if choice == "required" and not tools:
                raise ApiError.bad_request("tool_choice required needs tools", "tool_choice")
            return tools, choice
        kind = choice.get("type") if isinstance(choice, dict) else None
        if kind == "allowed_tools":
            allowed = {_name(each) for each in _objects(choice.get("tools"))}
            _check_names(allowed, names)
            found = [each for each in tools if each["function"]["name"] in allowed]
            return found, choice.get("mode") or "auto"
        if kind != "function":
            text = f"tool_choice of type {str(kind)[:80]!r} is not supported: {FUNCTIONS_ONLY}"
            raise ApiError.bad_request(text, "tool_choice", UNSUPPORTED)
        _check_names({name := _name(choice)}, names)
        return tools, {"type": "function", "function": {"name": name}}

    def namespaces(self) -> Named:
        """Which functions of the chat are of a namespace."""
        return named(self.tools or ())

    def shown_tools(self) -> list[Item]:
        """As a response shows them."""
        return [_shown(each) for each in self.tools or ()]


def _shown(tool: Item) -> Item:
    about = {"name": tool.get("name"), "description": tool.get("description")}
    if tool.get("type") == "namespace":
        return {"type": "namespace", **about, "tools": [_shown(each) for each in tool["tools"]]}
    more = {"parameters": tool.get("parameters"), "strict": tool.get("strict", True)}
    return {"type": "function", **about, **more}


def _chat_format(form: TextFormat) -> Item:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema_ is None:
        raise ApiError.bad_request("text.format: the schema is missing", "text.format")
    return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}


def _chat_tool(tool: Item) -> Item:
    kind = tool.get("type")
    if kind != "function":
        text = f"a tool of type {str(kind)[:80]!r} is not supported: {FUNCTIONS_ONLY}"
        raise ApiError.bad_request(text, "tools", UNSUPPORTED)
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise ApiError.bad_request("tools: a function must have a name", "tools")
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _objects(given: Any) -> list[Item]:
    return [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []


def _name(given: Item) -> str:
    return chat_name(given.get("namespace"), str(given.get("name", "")))


def _check_names(asked: set[str], known: set[str]) -> None:
    if not asked or asked - known:
        text = (
            f"tool_choice names {', '.join(sorted(asked)) or 'no tool'}, which tools does not have"
        )
        raise ApiError.bad_request(text[:300], "tool_choice")
