"""OpenAI's Responses API: requests become chats."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from baton.errors import RequestError
from baton.server.api_error import ApiError
from baton.server.pieces import Call, renamed
from baton.server.responses.answer import Output
from baton.server.responses.items import messages_of, plain_items
from baton.server.responses.schema import ResponsesRequest
from tests.pure.test_responses import CHAT_CALL, ids, says

INPUT = {"type": "input_text", "text": "A"}
THOUGHT = {
    "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}],
}  # fmt: skip
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "3"}

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
OTHER = {"type": "function", "name": "sub", "parameters": None, "description": "Minus."}


def chat_of(**request: Any) -> dict[str, Any]:
    found = ResponsesRequest.model_validate({"input": "Hi"} | request)
    return found.chat(plain_items(found.input, ids()))


def test_functions_of_a_namespace_are_flat_in_the_chat_and_told_apart_in_the_answer() -> None:
    """As Codex sends them: agents.add beside add, a call of it, and a forced one."""
    group = {"type": "namespace", "name": "agents", "description": "All.", "tools": [TOOL, OTHER]}
    forced = {"type": "function", "name": "add", "namespace": "agents"}
    turns = [says("user", "Hi"), CALL | {"namespace": "agents"}, RESULT]
    request = ResponsesRequest.model_validate(
        {"input": turns, "tools": [TOOL, group], "tool_choice": forced}
    )
    items = plain_items(request.input, ids())
    chat = request.chat(items)
    names = [each["function"]["name"] for each in chat["tools"]]
    assert names == ["add", "agents__add", "agents__sub"]
    assert chat["tool_choice"]["function"] == {"name": "agents__add"}
    assert chat["messages"][1]["tool_calls"][0]["function"]["name"] == "agents__add"
    assert items[1]["namespace"] == "agents"
    (_, shown) = request.shown_tools()
    assert (shown["type"], [each["name"] for each in shown["tools"]]) == (
        "namespace",
        ["add", "sub"],
    )
    output = Output(ids(), namespaces=request.namespaces())
    calls = [Call(0, "{}", "c1", "agents__add"), Call(1, "{}", "c2", "add")]
    events = [*output.take(calls), *output.end("completed")]
    told = [(each.get("namespace"), each["name"]) for each in output.items]
    assert told == [("agents", "add"), (None, "add")]
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event | {"sequence_number": 0})


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({"type": "namespace"}, "a namespace must have a name"),
        ({"type": "namespace", "name": "a"}, "the namespace 'a' must have a list of tools"),
        ({"type": "namespace", "name": "a", "tools": [1]}, "must have a list of tools"),
        ({"type": "namespace", "name": "a", "tools": [{"type": "function"}]}, "must have a name"),
        (
            {"type": "namespace", "name": "a", "tools": [{"type": "custom", "name": "b"}]},
            "'custom'",
        ),
        (
            {"type": "namespace", "name": "a", "tools": [{"type": "namespace", "name": "b"}]},
            "'namespace'",
        ),
    ],
)
def test_what_is_no_namespace_of_functions_is_refused(tool: Any, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        chat_of(tools=[tool])


@pytest.mark.parametrize(
    ("instructions", "given", "messages"),
    [
        (None, "Hi", [says("user", "Hi")]),
        ("Be short.", "Hi", [says("system", "Be short."), says("user", "Hi")]),
        ("A", [says("developer", "B"), says("user", "C")], [says("system", "A\n\nB"), says("user", "C")]),
        (None, [says("user", "C"), says("developer", "B")], [says("user", "C"), says("system", "B")]),
        (
            None,
            [{"type": "message", "role": "user", "content": [INPUT, INPUT]}],
            [{"role": "user", "content": [{"type": "text", "text": "A"}] * 2}],
        ),
        (
            None,
            [
                THOUGHT,
                {"role": "assistant", "content": [{"type": "output_text", "text": "Let me add."}]},
                CALL, CALL | {"call_id": "c2"}, RESULT, RESULT | {"call_id": "c2"},
                says("assistant", "3"), says("assistant", "Three."),
            ],
            [
                {"role": "assistant", "content": "Let me add.", "reasoning_content": "Hm",
                 "tool_calls": [CHAT_CALL, CHAT_CALL | {"id": "c2"}]},
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
                {"role": "tool", "tool_call_id": "c2", "content": "3"},
                says("assistant", "3"), says("assistant", "Three."),
            ],
        ),
        (
            None,
            [CALL, RESULT | {"output": [INPUT, INPUT]},
             {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            [{"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
             {"role": "tool", "tool_call_id": "c1", "content": "AA"}, says("assistant", "No.")],
        ),
    ],
)  # fmt: skip
def test_items_become_the_turns_of_a_chat(
    instructions: str | None, given: Any, messages: Sequence[Mapping[str, Any]]
) -> None:
    request = ResponsesRequest.model_validate({"input": given})
    plain = plain_items(request.input, ids())
    assert messages_of(instructions, plain) == messages
    again = ResponsesRequest.model_validate({"input": plain})  # as they come back from a client
    assert plain_items(again.input, ids()) == plain


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    chat = chat_of(
        max_output_tokens=7, text={"format": form}, reasoning={"effort": "low", "summary": "auto"},
        include=["message.output_text.logprobs"], top_logprobs=2, temperature=0.5, top_k=3, seed=None,
        store=False, user="Ann", metadata={"a": "b"}, stream=True, unknown=1,
    )  # fmt: skip
    assert chat == {
        "messages": [says("user", "Hi")], "max_completion_tokens": 7, "temperature": 0.5, "top_k": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "reasoning_effort": "low", "logprobs": True, "top_logprobs": 2, "stream": True, "unknown": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "tools", "found"),
    [
        (None, ["add", "sub"], None),
        ("required", ["add", "sub"], "required"),
        ({"type": "function", "name": "sub"}, ["add", "sub"],
         {"type": "function", "function": {"name": "sub"}}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "sub"}]},
         ["sub"], "required"),
    ],
)  # fmt: skip
def test_tools_become_those_of_a_chat(choice: Any, tools: list[str], found: Any) -> None:
    chat = chat_of(tools=[TOOL, OTHER], tool_choice=choice, parallel_tool_calls=False)
    assert [each["function"]["name"] for each in chat["tools"]] == tools
    assert chat["tools"][-1]["function"] == {"name": "sub", "description": "Minus."}
    assert chat.get("tool_choice") == found
    assert chat["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("request_", "param", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice", "mcp"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "x"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "input_image",
        ),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
            "input",
            "encrypted_content",
        ),
        ({"background": True}, "background", "stream"),
        ({"truncation": "auto"}, "truncation", "shorter"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "summary"),
        ({"text": {"verbosity": "low"}}, "text", "verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "schema"),
        ({"include": ["everything"]}, "include", "everything"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"messages": [says("user", "x")]}, "messages", "use input"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    request_: dict[str, Any], param: str, word: str
) -> None:
    with pytest.raises(ApiError, match=word) as refused:
        chat_of(**request_)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_errors_of_the_chat_name_the_fields_of_this_api() -> None:
    error = RequestError("max_tokens must be at most 3, prompt and max_tokens", param="max_tokens")
    found = renamed(error, {"max_tokens": "max_output_tokens", "prompt": "input"})
    assert found.message == "max_output_tokens must be at most 3, input and max_output_tokens"
    assert found.param == "max_output_tokens"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("prompt: must be a text, got 'the prompt'", "input: must be a text, got 'the prompt'"),
        ("stop: got {'prompt': \"it's stop\"}", "ends: got {'prompt': \"it's stop\"}"),
        ("stop: got 'prompt, cut o", "ends: got 'prompt, cut o"),
        ("the schema's keyword not at /properties/stop", "the schema's keyword not at /properties/stop"),
        ("a model's stop and the user's prompt", "a model's ends and the user's input"),
    ],
)  # fmt: skip
def test_what_a_client_sent_keeps_its_words(message: str, shown: str) -> None:
    error = ApiError.bad_request(message)
    assert renamed(error, {"prompt": "input", "stop": "ends"}).message == shown
