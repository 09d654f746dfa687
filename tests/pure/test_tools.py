"""Calls of tools, from the request to the answer, over a simulated cluster."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import jsonschema
import pytest

from tests.pure.town_app import TownClient, WordyTown, pretend_tokenizer, serving

CHAT = "/v1/chat/completions"
HERMES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or () %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}\n{% endfor %}{{ tools | tojson }}<assistant>"
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"], "description": "Where"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "max_tokens": 120, "temperature": 0,
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "now"}}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
TAGGED = f"<tool_call>\n{ROME}\n</tool_call>"


def served(work: Callable[[TownClient], Awaitable[Any]], wants: str = "", **options: Any) -> Any:
    async def run() -> Any:
        town = WordyTown(blocks=256)
        town.wants = pretend_tokenizer().encode(wants, special=False)
        async with serving(town, **{"template": HERMES} | options) as client:
            return await work(client)

    return asyncio.run(run())


def answer(wants: str = "", template: str = HERMES, **fields: Any) -> Any:
    """The choice, whole. The same streamed says the same."""

    async def work(client: TownClient) -> Any:
        whole = await client.ask(CHAT, ASKED | fields, submits=1)
        assert whole.status == 200, whole.json
        streamed = await client.ask(CHAT, ASKED | fields | {"stream": True}, submits=1)
        choice = whole.json["choices"][0]
        assert heard(streamed.body) == without_ids(choice)
        return choice

    return served(work, wants, template=template)


def without_ids(choice: Any) -> Any:
    message = choice["message"]
    calls = [each["function"] for each in message.get("tool_calls", ())]
    return message["content"] or "", calls, choice["finish_reason"]


def heard(body: bytes) -> Any:
    """As a client joins the chunks of a stream."""
    content, calls, reason = "", list[dict[str, str]](), None
    for line in body.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        content += choice["delta"].get("content") or ""
        reason = choice["finish_reason"] or reason
        for each in choice["delta"].get("tool_calls", ()):
            function = each["function"]
            if each["index"] == len(calls):
                assert each["id"].startswith("call_")
                assert (each["type"], function["arguments"]) == ("function", "")
                calls.append(dict(function))
            else:
                assert each.keys() == {"index", "function"}
                calls[each["index"]]["arguments"] += function["arguments"]
    return content, calls, reason


def test_a_required_call_fits_the_schema_whatever_the_model_wants() -> None:
    choice = answer("I would rather talk.", tool_choice="required", parallel_tool_calls=False)
    assert choice["finish_reason"] in ("tool_calls", "length")
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "now")
    if choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather":
        jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)


def test_the_named_tool_is_called_once() -> None:
    choice = answer(tool_choice=NAMED)
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "now", "arguments": "{}"})
    assert choice["finish_reason"] == "tool_calls"


def test_who_may_call_says_what_it_likes_and_calls() -> None:
    choice = answer(f"I will look.\n{TAGGED}\n{TAGGED}")
    assert choice["message"]["content"] == "I will look."
    rome = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert [each["function"] for each in choice["message"]["tool_calls"]] == [rome, rome]
    assert len({each["id"] for each in choice["message"]["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"
