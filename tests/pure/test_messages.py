"""Anthropic's Messages API: requests become chats, and what a chat answers becomes blocks and events."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings

from baton.server.api_error import ApiError, messages_body
from baton.server.bodies import model
from baton.server.messages.answer import SIGNATURE, UNREAD, Blocks, read_input, stop_of
from baton.server.messages.schema import CountRequest, MessagesRequest
from baton.server.pieces import Content
from tests.pure.test_responses import ANSWERS, cut, says
from tests.pure.town_app import CONTEXT, TownClient, WordyTown, serving

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HELLO = [says("user", "Hello")]
USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
IMAGE = {"type": "image"}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "3"}
CHAT_CALL = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def chat_of(**request: Any) -> dict[str, Any]:
    given_ = {"messages": HELLO, "max_tokens": 9} | request
    return MessagesRequest.model_validate(given_).chat()


# ---- requests


@pytest.mark.parametrize(
    ("system", "given_", "messages"),
    [
        (None, HELLO, HELLO),
        ("Be short.", HELLO, [says("system", "Be short."), *HELLO]),
        ([text("A") | {"cache_control": {}}, text("B")], HELLO, [says("system", "A\n\nB"), *HELLO]),
        (None, [{"role": "user", "content": [text("A"), text("B")]}],
         [{"role": "user", "content": [text("A"), text("B")]}]),
        (
            None,
            [
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "x"}, text("Let me add."), USE,
                    USE | {"id": "t2"},
                ]},
                {"role": "user", "content": [
                    RESULT, RESULT | {"tool_use_id": "t2", "content": [text("4"), text("2")]},
                    text("Well?"),
                ]},
            ],
            [
                {"role": "assistant", "content": "Let me add.", "reasoning_content": "Hm",
                 "tool_calls": [CHAT_CALL, CHAT_CALL | {"id": "t2"}]},
                {"role": "tool", "tool_call_id": "t1", "content": "3"},
                {"role": "tool", "tool_call_id": "t2", "content": "4\n2"},
                says("user", "Well?"),
            ],
        ),
        (
            None,
            [
                {"role": "assistant", "content": [USE]},
                {"role": "user", "content": [RESULT | {"is_error": True, "content": "no file"}]},
                says("system", "Hurry."),
            ],
            [
                {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
                {"role": "tool", "tool_call_id": "t1", "content": "Error: no file"},
                says("system", "Hurry."),
            ],
        ),
    ],
)  # fmt: skip
def test_messages_become_those_of_a_chat(
    system: Any, given_: Any, messages: Sequence[Mapping[str, Any]]
) -> None:
    assert chat_of(system=system, messages=given_)["messages"] == messages


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object"}
    assert chat_of(
        model="m", stop_sequences=["a"], temperature=0.5, top_p=0.5, top_k=3, stream=True, seed=7,
        output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"},
        metadata={"user_id": "x"}, service_tier="auto", cache_control=None,
        thinking={"type": "disabled"}, chat_template_kwargs={"a": 1},
    ) == {
        "model": "m", "messages": HELLO, "max_tokens": 9, "stop": ["a"], "temperature": 0.5, "top_p": 0.5,
        "top_k": 3, "stream": True, "seed": 7, "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "chat_template_kwargs": {"enable_thinking": False, "a": 1}, "include_reasoning": False,
    }  # fmt: skip
    thinks = chat_of(thinking={"type": "enabled", "budget_tokens": 4})
    assert thinks["chat_template_kwargs"] == {"enable_thinking": True}
    assert "include_reasoning" not in thinks


def test_context_management_that_clears_nothing_is_taken() -> None:
    """A coding agent sends the second with every request."""
    for edits in ([], [{"type": "clear_thinking_20251015", "keep": "all"}]):
        assert chat_of(context_management={"edits": edits})["messages"] == HELLO


def test_an_answer_goes_on_with_a_last_text_of_the_assistant() -> None:
    found = chat_of(messages=[*HELLO, says("assistant", "I am")])
    assert (found["continue_final_message"], found["add_generation_prompt"]) == (True, False)
    found = chat_of(messages=[*HELLO, {"role": "assistant", "content": [USE]}])
    assert "continue_final_message" not in found


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, {}),
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "any", "disable_parallel_tool_use": True},
         {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "tool", "name": "add"},
         {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
    ],
)  # fmt: skip
def test_tools_become_those_of_a_chat(choice: Any, found: dict[str, Any]) -> None:
    chat = chat_of(tools=[TOOL | {"type": "custom", "cache_control": {}}], tool_choice=choice)
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert chat.pop("tools") == [{"type": "function", "function": function}]
    assert {name: chat[name] for name in chat if "tool" in name} == found


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "tool_use"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "tool_result"),
        ({"messages": [{"role": "user", "content": [RESULT | {"content": [IMAGE]}]}]}, "image"),
        ({"system": [{"type": "thinking", "thinking": "x"}]}, "type text"),
        ({"messages": []}, "messages"),
        ({"messages": [says("bot", "x")]}, "role"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "budget_tokens"),
        ({"stop": "x"}, "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, "context_management"),
        ({"response_format": {"type": "json_object"}}, "output_config"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(request_: dict[str, Any], word: str) -> None:
    async def read() -> None:
        request = await model(
            MessagesRequest, {"messages": HELLO, "max_tokens": 9} | request_, size=0
        )
        request.chat()

    with pytest.raises(ApiError, match=word) as refused:
        asyncio.run(read())
    assert refused.value.status == 400
    assert messages_body(refused.value)["error"]["type"] == "invalid_request_error"


# ---- answers


@given(ANSWERS)
@settings(deadline=None)
def test_an_answer_is_the_same_however_it_was_cut(answer: list[tuple[str, str]]) -> None:
    whole = Blocks()
    list(whole.take(list(cut(answer, 99))))
    list(whole.end())
    for size in (1, 2, 5):
        parts = Blocks()
        events = [event for piece in cut(answer, size) for event in parts.take([piece])]
        events += parts.end()
        assert parts.content == whole.content
        by_block = groupby(events, key=lambda event: event["index"])
        for block, (_, group) in zip(parts.content, by_block, strict=True):
            begins, *deltas, ends = group
            assert begins["content_block"]["type"] == block["type"]
            assert (begins["type"], ends["type"]) == ("content_block_start", "content_block_stop")
            said = [each["delta"] for each in deltas if "signature" not in each["delta"]]
            kind = {"text": "text_delta", "thinking": "thinking_delta"}.get(
                block["type"], "input_json_delta"
            )
            assert {each["type"] for each in said} <= {kind}
            joined = "".join(next(v for k, v in each.items() if k != "type") for each in said)
            if block["type"] == "tool_use":
                assert read_input(joined) == block["input"]
            else:
                assert joined == block[block["type"]]
            if block["type"] == "thinking":
                assert block["signature"] == SIGNATURE


def test_an_answer_without_text_is_an_empty_text() -> None:
    blocks = Blocks()
    assert list(blocks.take([Content("")])) == []
    assert [each["type"] for each in blocks.end()] == ["content_block_start", "content_block_stop"]
    assert blocks.content == [text("") | {"citations": None}]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [('{"a": [1]}', {"a": [1]}), ("", {}), ('{"a": ', {UNREAD: '{"a": '}), ("[1]", {UNREAD: "[1]"}),
     ('{"a": 1e999}', {UNREAD: '{"a": 1e999}'}), ('{"a": NaN}', {UNREAD: '{"a": NaN}'})],
)  # fmt: skip
def test_arguments_that_are_no_object_are_shown_as_they_are(
    arguments: str, found: dict[str, Any]
) -> None:
    assert read_input(arguments) == found


def test_it_says_why_it_stopped() -> None:
    reasons = [
        stop_of(reason, stop, cut=cut_)["stop_reason"]
        for reason, stop, cut_ in (
            ("stop", "", False), ("stop", "x", False), ("length", "", False), ("length", "", True),
            ("tool_calls", "", False),
        )
    ]  # fmt: skip
    assert reasons == [
        "end_turn", "stop_sequence", "max_tokens", "model_context_window_exceeded", "tool_use",
    ]  # fmt: skip


# ---- over HTTP


def events_of(body: bytes) -> list[dict[str, Any]]:
    found = []
    for each in body.decode().split("\n\n")[:-1]:
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_stream_says_what_the_whole_message_says() -> None:
    async def ask(client: TownClient, **more: Any) -> dict[str, Any]:
        asked = {"messages": HELLO, "max_tokens": 9, "temperature": 0} | more
        client.fresh()
        whole = (await client.ask(MESSAGES, asked, submits=1)).json
        client.fresh()
        stream = await client.ask(MESSAGES, asked | {"stream": True}, submits=1)
        events = events_of(stream.body)
        kinds = [each["type"] for each in events]
        assert kinds[:3] == ["message_start", "ping", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        begun, ended = events[0]["message"], events[-2]
        assert begun["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        usage = begun["usage"] | ended["usage"]
        told = begun | {"id": "", "content": whole["content"], "usage": usage} | ended["delta"]
        assert told == whole | {"id": ""}
        deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
        joined = "".join(each.get("text", each.get("thinking", "")) for each in deltas)
        block = whole["content"][0]
        assert joined == block[block["type"]]
        counted = await client.ask(COUNT, {"messages": HELLO})
        assert counted.json == {"input_tokens": whole["usage"]["input_tokens"]}
        assert isinstance(whole, dict)
        return whole

    async def work() -> None:
        async with serving() as client:
            plain = await ask(client)
            said = plain["content"][0]["text"]
            assert (plain["stop_reason"], plain["usage"]["output_tokens"]) == ("max_tokens", 9)
            stop = said[5:8]
            stopped = await ask(client, stop_sequences=["never", stop])
            assert stopped["content"] == [text(said[: said.index(stop)]) | {"citations": None}]
            assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
            again = await client.ask(MESSAGES, {"messages": HELLO, "max_tokens": 2}, submits=1)
            usage = again.json["usage"]
            assert usage["cache_read_input_tokens"] > 0
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 13
        async with serving(WordyTown(blocks=256)) as client:
            long = {"messages": HELLO, "max_tokens": CONTEXT}
            answer = await client.ask(MESSAGES, long, submits=1)
            assert answer.json["stop_reason"] == "model_context_window_exceeded"
            assert answer.json["usage"]["output_tokens"] == CONTEXT - 13
        async with serving(WordyTown(blocks=16)) as client:  # a pool smaller than the context
            answer = await client.ask(MESSAGES, long, submits=1)
            assert answer.json["stop_reason"] == "model_context_window_exceeded"
            free = await client.ask("/v1/chat/completions", {"messages": HELLO}, submits=1)
            assert free.json["choices"][0]["finish_reason"] == "length"
            longer = {"messages": [says("user", "x" * 9 * CONTEXT)], "max_tokens": 9}
            assert (await client.ask(MESSAGES, longer)).status == 400
        async with serving(template="{{ messages[0]['content'] }}<think>{# </think> #}") as client:
            thinks = await ask(client)
            assert [each["type"] for each in thinks["content"]] == ["thinking"]

    asyncio.run(work())


def test_a_failure_is_an_event_of_the_stream() -> None:
    async def work() -> None:
        async with serving() as client:
            ids = (await client.ask("/tokenize", {"messages": HELLO})).json["tokens"]
            client.exchange.town.poisoned.add(ids[0])
            asked = {"messages": HELLO, "max_tokens": 9, "stream": True}
            last = events_of((await client.ask(MESSAGES, asked, submits=1)).body)[-1]
            assert last["type"] == "error"
            assert last["error"]["type"] == "api_error"

    asyncio.run(work())


def test_errors_have_the_form_of_this_api_and_both_headers_carry_keys() -> None:
    async def work() -> None:
        async with serving(api_keys=("secret",)) as client:
            own = {"x-api-key": "secret"}
            both = {"authorization": "Bearer other", "x-api-key": "secret"}
            asked: list[tuple[str, Any, Mapping[str, str], int, str]] = [
                (MESSAGES, {}, {}, 401, "authentication_error"),
                (MESSAGES, {}, {"x-api-key": "wrong"}, 401, "authentication_error"),
                (MESSAGES, {}, both, 400, "invalid_request_error"),
                (MESSAGES, b"{", own, 400, "invalid_request_error"),
                (MESSAGES, b"{}", own | {"content-type": "text/plain"}, 400, "invalid_request_error"),
                (MESSAGES, None, own, 405, "invalid_request_error"),
                (f"{MESSAGES}/batches", {}, own, 404, "not_found_error"),
                (COUNT, {"messages": HELLO, "model": "x"}, own, 404, "not_found_error"),
                (COUNT, {"messages": 3}, own, 400, "invalid_request_error"),
            ]  # fmt: skip
            for path, body, headers, status, kind in asked:
                answer = await client.ask(path, body, headers=headers)
                assert answer.status == status
                assert set(answer.json) == {"type", "error", "request_id"}
                assert answer.headers["request-id"] == answer.headers["x-request-id"]
                assert answer.json["error"]["type"] == kind
            assert (await client.ask(COUNT, {"messages": HELLO}, headers=own)).status == 200

    asyncio.run(work())


def test_counting_needs_no_max_tokens() -> None:
    assert CountRequest.model_validate({"messages": HELLO}).chat() == {"messages": HELLO}
