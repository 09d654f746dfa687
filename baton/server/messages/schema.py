"""Schema: a request of Anthropic's Messages API, field by field, and the chat made of it.

Fields that chats have beside OpenAI's (seed, min_p, guided_json, chat_template_kwargs, ...) are theirs
here, too: done, or refused by name. Those that say who asks, or how (metadata, service_tier,
cache_control), have no effect.
https://docs.claude.com/en/api/messages
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from baton.params import MAX_STOPS
from baton.server.api_error import ApiError
from baton.server.conversation import MAX_TOOLS
from baton.server.fields import LEAVE_OUT, UNSUPPORTED, Fields, Refusals
from baton.server.messages.turns import Chat, Texts, Turns
from baton.server.schema import Bool, Int, Number, Text

NOTHING_CLEARED: tuple[Any, ...] = (
    {"edits": []},
    {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
)
"""Of context_management: what leaves a conversation as it is. Coding agents send the second."""

MESSAGES: Refusals = {
    "container": ((), LEAVE_OUT), "mcp_servers": ((), "use tools"),
    "context_management": (NOTHING_CLEARED, LEAVE_OUT), "inference_geo": ((), LEAVE_OUT),
    # of a chat
    "n": ((1,), "send several requests"), "best_of": ((1,), LEAVE_OUT),
    "stop": ((), "use stop_sequences"),
    "max_completion_tokens": ((), "use max_tokens"), "logprobs": ((False,), LEAVE_OUT),
    "top_logprobs": ((0,), LEAVE_OUT), "response_format": ((), "use output_config.format"),
    "reasoning_effort": ((), "use output_config.effort"), "include_reasoning": ((True,), "use thinking"),
    "parallel_tool_calls": ((True,), "use tool_choice.disable_parallel_tool_use"),
    "add_generation_prompt": ((True,), "end messages with one of the assistant"),
    "continue_final_message": ((False,), "end messages with one of the assistant"),
    "return_token_ids": ((False,), LEAVE_OUT), "return_tokens_as_token_ids": ((False,), LEAVE_OUT),
    "stream_options": ((), LEAVE_OUT), "include_stop_str_in_output": ((False,), LEAVE_OUT),
}  # fmt: skip
NAMES = {
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "prompt": "messages",
}
"""What a chat's fields are called here."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""tool_choice, as a chat has it."""


class OutputFormat(Fields):
    """The format that the text must have."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    """How the text is."""

    effort: Text | None = Field(None, max_length=64, description="A variable of the template.")
    format: OutputFormat | None = None


class Thinking(Fields):
    """How the model thinks. What it may take for it is a target, which max_tokens bounds."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = Field(None, ge=1, lt=2**31)
    display: Literal["summarized", "omitted"] | None = None


class CountRequest(Fields):
    """/v1/messages/count_tokens."""

    unsupported: ClassVar[Refusals] = MESSAGES

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    messages: Turns
    system: Texts | None = None
    thinking: Thinking | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="Older than output_config.format.")
    cache_control: Any = None
    metadata: Any = None
    service_tier: Any = None
    _given: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, check: ModelWrapValidatorHandler["CountRequest"]) -> "CountRequest":
        request = check(given)
        request._given = given
        return request

    def chat(self) -> dict[str, Any]:
        """The chat that it asks for. Raises ApiError."""
        chat = Chat(self.system)
        for turn in self.messages:
            chat.add(turn)
        ours = type(self).model_fields.keys()
        found = {name: value for name, value in self._given.items() if name not in ours}
        tools = [_chat_tool(each) for each in self.tools or ()]
        config = self.output_config or OutputConfig.model_validate({})
        form = config.format or self.output_format
        found |= {
            "model": self.model,
            "messages": chat.messages,
            "tools": tools or None,
            "reasoning_effort": config.effort,
            "response_format": None
            if form is None
            else {"type": form.type, "json_schema": {"schema": form.schema_}},
        }
        if self.messages[-1].goes_on:
            found |= {"add_generation_prompt": False, "continue_final_message": True}
        found |= self._thinking() | self._choice({each["function"]["name"] for each in tools})
        return {name: value for name, value in found.items() if value is not None}

    def _thinking(self) -> dict[str, Any]:
        thinking = self.thinking
        if thinking is None:
            return {}
        found: dict[str, Any] = {}
        given = self._given.get("chat_template_kwargs") or {}
        if thinking.type != "adaptive" and isinstance(given, dict):
            switch = {"enable_thinking": thinking.type == "enabled"}
            found["chat_template_kwargs"] = switch | given
        if thinking.type == "disabled" or thinking.display == "omitted":
            found["include_reasoning"] = False
        return found

    def _choice(self, names: set[str]) -> dict[str, Any]:
        """tool_choice, and whether several tools may be called."""
        choice = self.tool_choice
        if choice is None:
            return {}
        kind, asked = choice.get("type"), choice.get("name")
        if kind == "tool":
            if asked not in names:
                text = f"tool_choice names {str(asked)[:80]!r}, which tools does not have"
                raise ApiError.bad_request(text, "tool_choice")
            found: Any = {"type": "function", "function": {"name": asked}}
        elif kind in CHOICES:
            found = CHOICES[str(kind)]
            if kind == "any" and not names:
                raise ApiError.bad_request("tool_choice any needs tools", "tool_choice")
        else:
            text = "tool_choice must have the type auto, any, tool or none"
            raise ApiError.bad_request(text, "tool_choice")
        if not names:
            return {}
        alone = choice.get("disable_parallel_tool_use")
        return {"tool_choice": found, "parallel_tool_calls": False if alone else None}


class MessagesRequest(CountRequest):
    """/v1/messages."""

    max_tokens: Int = Field(ge=1, lt=2**31)
    stop_sequences: list[Text] | None = Field(None, max_length=MAX_STOPS)
    temperature: Number | None = Field(None, ge=0, le=2, description="0: greedy.")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, lt=2**31, description="-1 or 0: off.")
    stream: Bool | None = False

    def chat(self) -> dict[str, Any]:
        """The chat that it asks for. Raises ApiError."""
        thinking = self.thinking
        if thinking and thinking.budget_tokens and thinking.budget_tokens >= self.max_tokens:
            text = f"thinking.budget_tokens must be less than max_tokens, {self.max_tokens}"
            raise ApiError.bad_request(text, "thinking")
        more = {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": bool(self.stream),
        }
        return super().chat() | {name: each for name, each in more.items() if each is not None}


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        text = f"a tool of type {str(kind)[:80]!r} is not supported: only custom tools are"
        raise ApiError.bad_request(text, "tools", UNSUPPORTED)
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise ApiError.bad_request("tools: a tool must have a name", "tools")
    if not isinstance(tool.get("input_schema"), dict):
        raise ApiError.bad_request("tools: a tool must have an input_schema", "tools")
    given = {"name": tool["name"], "description": tool.get("description")}
    given |= {"parameters": tool["input_schema"], "strict": tool.get("strict")}
    function = {name: value for name, value in given.items() if value is not None}
    return {"type": "function", "function": function}
