"""LLM tools: calls of tools in LLM.chat, with the template, grammar and reading of /v1/chat/completions.

chat = ToolChats(files, template, tokenizer)           once for an LLM
turn = chat.turn(messages, tools, choice, ...)         one call of chat()
turn.text -> prompt;  turn.guided(params) -> params;  turn.read(completion) -> completion with tool_calls
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton import grammar
from baton.client.batch import Completion
from baton.errors import RequestError
from baton.grammar import Grammars
from baton.model_files import ModelFiles
from baton.params import GenerationParams
from baton.server.api_error import ApiError
from baton.server.speech import begins
from baton.server.templates import (
    ChatTemplate,
    CompiledTemplate,
    call_format,
    knows_reasoning,
    knows_tools,
    takes_one_call,
)
from baton.server.tools import KnownSchemas, ToolUse, answer_schema, tool_use
from baton.server.tools_answer import ToolReading, whole_answer
from baton.server.tools_ids import numbered
from baton.server.tools_prompt import with_tools_told
from baton.server.turns import Conversation
from baton.text import Tokenizer
from baton.tool_calls import CallFormat


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """One conversation with tools, ready to be answered. `reading`: None if no tool may be called."""

    text: str
    use: ToolUse | None
    form: CallFormat
    one_call: bool
    thinking: bool | None
    schemas: KnownSchemas
    marks: tuple[int, ...]

    def guided(self, params: GenerationParams) -> GenerationParams:
        """The answer is text or calls. Raises RequestError."""
        if self.use is None:
            return params
        try:
            answer = answer_schema(params.grammar, "regex")
            calls = self.use.calls(self.form, self.schemas, thinking=self.thinking, answer=answer)
        except ApiError as error:
            raise as_request_error(error) from error
        calls = replace(calls, several=calls.several and not self.one_call)
        written = grammar.tool_calls(calls)
        return replace(params, grammar=written, shown_special=self.marks, keep_special=False)

    def read(self, answer: Completion) -> Completion:
        """With the calls apart from the text, and without reasoning that the template tells apart."""
        if self.use is None:
            return answer
        reading: ToolReading = self.use.reading(self.form, self.schemas)
        found = whole_answer(answer.text, answer.finish_reason, self.thinking, reading)
        return replace(
            answer,
            text=found.content,
            finish_reason=found.finish_reason or answer.finish_reason,
            tool_calls=tuple((each.name, each.arguments) for each in found.calls),
        )


class ToolChats:
    """Of one model."""

    def __init__(self, files: ModelFiles, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._compiled = CompiledTemplate(template)
        self._form, self._one_call = call_format(template), takes_one_call(template)
        self._offers, self._reasons = knows_tools(template), knows_reasoning(template)
        grammars = Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
        self._schemas = KnownSchemas(grammars.check)
        known = self._form.marks
        self._marks = tuple(
            each for each in sorted(tokenizer.special_ids) if tokenizer.token(each) in known
        )

    def turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        choice: str | Mapping[str, Any],
        *,
        parallel: bool,
    ) -> ToolTurn:
        """`tools` and `choice` are OpenAI's. Raises RequestError."""
        try:
            json.dumps(tools, allow_nan=False)
            use = tool_use(tools, choice, parallel=parallel)
        except ApiError as error:
            raise as_request_error(error) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"tools must be JSON: {error}") from error
        offered = None if choice == "none" else list(tools)
        conversation = Conversation(messages, tools=offered)
        if not self._offers:
            conversation = with_tools_told(conversation, self._form)
        elif self._form.marked is not None and self._form.marked.numbered:
            conversation = replace(conversation, messages=numbered(conversation.messages))
        text = self._compiled.render(conversation)
        thinking = begins(text) if self._reasons else None
        if self._form.channels:  # reasoning is one of them
            thinking = False
        return ToolTurn(text, use, self._form, self._one_call, thinking, self._schemas, self._marks)


def as_request_error(error: ApiError) -> RequestError:
    """The server's refusal, as Python's callers get it."""
    return RequestError(error.message, code=error.code or "invalid_request", param=error.param)
