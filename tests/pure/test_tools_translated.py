"""Calls of tools in the Responses API and in Anthropic's Messages API: whole and streamed."""

import json
from typing import Any

from tests.pure.test_messages import events_of
from tests.pure.test_tools import CITY, TAGGED, served
from tests.pure.town_app import TownClient

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TOOL = {"type": "function", "name": "weather", "parameters": CITY}
CUSTOM = {"name": "weather", "input_schema": CITY}
SAID = f"Well. {TAGGED}"


def test_a_response_calls_and_goes_on_with_what_came_of_it() -> None:
    async def work(client: TownClient) -> None:
        asked = {"input": "Hi", "tools": [TOOL], "max_output_tokens": 120, "temperature": 0}
        whole = (await client.ask(RESPONSES, asked, submits=1)).json
        message, call = whole["output"]
        assert message["content"][0]["text"].strip() == "Well."
        assert (call["type"], call["name"]) == ("function_call", "weather")
        assert json.loads(call["arguments"]) == {"city": "Rome"}
        assert whole["status"] == "completed"
        stream = await client.ask(RESPONSES, asked | {"stream": True}, submits=1)
        events = events_of(stream.body)
        deltas = [
            e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"
        ]
        assert "".join(deltas) == call["arguments"]
        assert events[-1]["type"] == "response.completed"
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny"}
        goes_on = asked | {"input": [result], "previous_response_id": whole["id"]}
        second = await client.ask(RESPONSES, goes_on | {"tool_choice": "none"}, submits=1)
        assert [each["type"] for each in second.json["output"]] == ["message"]

    served(work, SAID)


def test_a_response_is_forced_to_call() -> None:
    async def work(client: TownClient) -> None:
        for choice in ("required", {"type": "function", "name": "weather"}):
            asked = {"input": "Hi", "tools": [TOOL], "tool_choice": choice, "max_output_tokens": 150,
                     "parallel_tool_calls": False}  # fmt: skip
            output = (await client.ask(RESPONSES, asked, submits=1)).json["output"]
            assert [each["type"] for each in output] == ["function_call"]

    served(work)


def test_a_message_uses_a_tool_and_goes_on_with_its_result() -> None:
    async def work(client: TownClient) -> None:
        asked: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Hi"}], "tools": [CUSTOM], "max_tokens": 120,
            "temperature": 0,
        }  # fmt: skip
        whole = (await client.ask(MESSAGES, asked, submits=1)).json
        text, use = whole["content"]
        assert text["text"].strip() == "Well."
        assert (use["type"], use["name"], use["input"]) == ("tool_use", "weather", {"city": "Rome"})
        assert whole["stop_reason"] == "tool_use"
        stream = await client.ask(MESSAGES, asked | {"stream": True}, submits=1)
        events = events_of(stream.body)
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        joined = "".join(each.get("partial_json", "") for each in deltas)
        assert json.loads(joined) == use["input"]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "Sunny"}
        turns = [
            *asked["messages"], {"role": "assistant", "content": whole["content"]},
            {"role": "user", "content": [result]},
        ]  # fmt: skip
        none = {"messages": turns, "tool_choice": {"type": "none"}}
        second = await client.ask(MESSAGES, asked | none, submits=1)
        assert second.json["stop_reason"] in ("end_turn", "max_tokens")

    served(work, SAID)


def test_a_message_is_forced_to_use_a_tool() -> None:
    async def work(client: TownClient) -> None:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            alone = choice | {"disable_parallel_tool_use": True}
            asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [CUSTOM],
                     "max_tokens": 150, "tool_choice": alone}  # fmt: skip
            content = (await client.ask(MESSAGES, asked, submits=1)).json["content"]
            assert [each["type"] for each in content] == ["tool_use"]

    served(work)


def test_half_a_surrogate_pair_in_an_input_fails_no_message() -> None:
    async def work(client: TownClient) -> None:
        tool = {"name": "note", "input_schema": {"type": "object", "additionalProperties": True}}
        asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 120,
                 "temperature": 0}  # fmt: skip
        whole = await client.ask(MESSAGES, asked, submits=1)
        assert (whole.status, whole.json["content"][0]["input"]) == (200, {"a": "?"})
        stream = await client.ask(MESSAGES, asked | {"stream": True}, submits=1)
        deltas = [e["delta"] for e in events_of(stream.body) if e["type"] == "content_block_delta"]
        joined = "".join(each.get("partial_json", "") for each in deltas)
        assert joined == r'{"a": "\ud800"}'

    value = r'<parameter=a>\n"\ud800"\n</parameter>'.replace(r"\n", "\n")
    call = f"<tool_call>\n<function=note>\n{value}\n</function>\n</tool_call>"
    served(work, call, tool_call_parser="qwen3_coder")
