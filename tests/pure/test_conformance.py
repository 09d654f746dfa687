"""Every answer, every chunk and every error agrees with what OpenAI and Anthropic say of their APIs.

Judged twice: by the providers' own descriptions, made strict (descriptions.py), and by the models of the
openai package, without coercion. A field that neither has must be listed here as ours.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.pure.descriptions import Description, branch
from tests.pure.town_app import Answer, TownClient, WordyTown, pretend_tokenizer, serving

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
EMBEDDINGS, MESSAGES = "/v1/embeddings", "/v1/messages"
ANY: Mapping[str, Any] = {}
OURS = {
    "ChatCompletionResponseMessage": {"reasoning_content": ANY},
    "ChatCompletionStreamResponseDelta": {"reasoning_content": ANY},
    "CreateChatCompletionResponse": {"prompt_token_ids": ANY},
    "CreateChatCompletionResponse.choices[]": {"token_ids": ANY},
    "CreateChatCompletionStreamResponse": {"prompt_token_ids": ANY},
    "CreateChatCompletionStreamResponse.choices[]": {"token_ids": ANY},
    "CreateCompletionResponse.choices[]": {"token_ids": ANY, "prompt_token_ids": ANY},
    "Model": {"chat": ANY, "max_model_len": ANY, "root": ANY},
}
"""docs/serving.md has them."""
OUR_NAMES = {name for fields in OURS.values() for name in fields}
TEXT_OR_NULL = {"type": ["string", "null"]}
FORGOTTEN = {
    "ResponseUsage.input_tokens_details": {"cache_write_tokens": {"type": "integer"}},
    "ModelResponseProperties": {"store": {"type": "boolean"}}
    | dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), TEXT_OR_NULL),
}
NOT_IN_PACKAGE = {*OUR_NAMES, *(name for fields in FORGOTTEN.values() for name in fields), "name"}
"""`name`: of response.function_call_arguments.done, which the description has."""
"""What the openai package has, and the examples within the description, but not its schemas."""
IN_WORDS = {
    "request_too_large": "invalid_request_error", "model_context_window_exceeded": "max_tokens",
}  # fmt: skip
"""Of Anthropic: what its documentation lists beside the second, but not its schemas."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or () %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}\n{% endfor %}{{ tools | tojson }}<assistant>{# </think> #}"
)
SAID = (
    "<think>Hm</think>I look."
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
)
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Of a city", "parameters": CITY}
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
TALK: dict[str, Any] = {"messages": HELLO, "max_tokens": 5, "temperature": 0}
CALLS = TALK | {"tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 90}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
PROMPT: dict[str, Any] = {"prompt": "In the future", "max_tokens": 5, "temperature": 0}
USAGE = {"stream_options": {"include_usage": True}}
EVERY_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

CHATS: dict[str, dict[str, Any]] = {
    "plain": TALK, "n": TALK | {"n": 2}, "stop": TALK | {"stop": "e"},
    "logprobs": TALK | {"logprobs": True}, "top_logprobs": TALK | {"logprobs": True, "top_logprobs": 2},
    "ids": TALK | {"return_token_ids": True},
    "schema": TALK | {"response_format": FORM, "max_tokens": 30},
    "auto": CALLS, "forced": CALLS | {"tool_choice": "required"}, "cut off": CALLS | {"max_tokens": 50},
    "calls, logprobs": CALLS | {"logprobs": True, "top_logprobs": 1},
    "two, calls": CALLS | {"n": 2, "tool_choice": "required"},
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "plain": PROMPT, "n": PROMPT | {"n": 2}, "list": PROMPT | {"prompt": ["One day", "The end"]},
    "ids": PROMPT | {"prompt": [301, 302], "return_token_ids": True}, "stop": PROMPT | {"stop": " old"},
    "logprobs": PROMPT | {"logprobs": 2}, "logprobs 0": PROMPT | {"logprobs": 0},
    "echo": PROMPT | {"echo": True}, "echo, logprobs": PROMPT | {"echo": True, "logprobs": 1},
    "echo alone": PROMPT | {"echo": True, "logprobs": 1, "max_tokens": 0},
}  # fmt: skip
TOOL = {"type": "function", **FUNCTION, "strict": True}
ASKED: dict[str, Any] = {"input": "Hello", "max_output_tokens": 5, "temperature": 0}
RESPONDED: dict[str, dict[str, Any]] = {
    "plain": ASKED,
    "logprobs": ASKED | {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "calls": ASKED | {"max_output_tokens": 90, "tools": [TOOL], "instructions": "Be short."},
    "forced": ASKED | {"max_output_tokens": 90, "tools": [TOOL], "tool_choice": "required",
                       "parallel_tool_calls": False},
    "named": ASKED | {"max_output_tokens": 90, "tools": [TOOL], "metadata": {"a": "b"},
                      "tool_choice": {"type": "function", "name": "weather"}},
    "schema": ASKED | {"max_output_tokens": 30, "text": {
        "format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
    "effort": ASKED | {"reasoning": {"effort": "low"}, "user": "u", "store": False},
}  # fmt: skip
USED: dict[str, dict[str, Any]] = {
    "plain": TALK, "stop": TALK | {"stop_sequences": ["e"]},
    "calls": TALK | {"max_tokens": 90, "tools": [{"name": "weather", "input_schema": CITY}]},
    "forced": TALK | {"max_tokens": 90, "tools": [{"name": "weather", "input_schema": CITY}],
                      "tool_choice": {"type": "any"}},
    "too many": TALK | {"max_tokens": 100_000},
}  # fmt: skip


@cache
def description(provider: str, name: str) -> Description:
    return Description(provider, name, OURS | FORGOTTEN if provider == "openai" else {})


UNIONS = ("ResponseStreamEvent", "MessageStreamEvent")
SEEN: set[tuple[str, str, str]] = set()
"""Forms that were judged: the chunks of a stream are many, and their forms few."""


def form_of(value: Any) -> Any:
    """What a schema may look at: names, types, and texts that are one of a few."""
    if isinstance(value, dict):
        return {k: v if k in NAMED and isinstance(v, str) else form_of(v) for k, v in value.items()}
    if isinstance(value, list):
        return [form_of(each) for each in value]
    return type(value).__name__


NAMED = {"type", "object", "role", "status", "finish_reason", "stop_reason", "reason", "code"}


def agrees(value: Any, provider: str, name: str) -> None:
    if name.startswith("Response") and isinstance(value, dict):  # as OpenAI's examples have it
        response = value.get("response", value)
        if response.get("usage", "") is None:
            value = json.loads(json.dumps(value))
            del value.get("response", value)["usage"]
    if provider == "anthropic":
        text = json.dumps(value)
        for said, alike in IN_WORDS.items():
            text = text.replace(json.dumps(said), json.dumps(alike))
        value = json.loads(text)
    if name in UNIONS:
        name = branch(provider, name, value["type"])
    form = provider, name, json.dumps(form_of(value))
    if form in SEEN:
        return
    found = description(provider, name).problems(value)
    SEEN.add(form)
    assert not found, f"{name}: {found} in {json.dumps(value)[:2000]}"


def unknown(value: Any, place: str = "") -> Iterator[str]:
    """Fields that a model of the openai package does not know."""
    if isinstance(value, BaseModel):
        yield from (
            f"{place}.{name}" for name in value.model_extra or {} if name not in NOT_IN_PACKAGE
        )
        for name in type(value).model_fields:
            yield from unknown(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from unknown(each, f"{place}[]")


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def reads(body: str | bytes, kind: Any) -> Any:
    """As the openai package has it, without coercion."""
    found = adapter(kind).validate_json(body, strict=True)
    assert not list(unknown(found))
    return found


def events(answer: Answer) -> list[tuple[str | None, str]]:
    """Name and data of each event of a stream."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        assert lines.keys() <= {"event", "data"}
        found.append((lines.get("event"), lines["data"]))
    return found


def submits(body: Mapping[str, Any]) -> int:
    """Of those that are sent at once: choices of a long prompt wait for its first token."""
    if "tools" in body:
        return 1
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and isinstance(prompt[0], str)
    return int(body.get("n", 1)) * (len(prompt) if several and isinstance(prompt, list) else 1)


async def asked(client: TownClient, path: str, body: Mapping[str, Any], **more: Any) -> Answer:
    return await client.ask(path, {**body, **more}, submits=submits(body))


async def chats(client: TownClient) -> None:
    for name, body in CHATS.items():
        whole = await asked(client, CHAT, body)
        assert whole.status == 200, (name, whole.json)
        agrees(whole.json, "openai", "CreateChatCompletionResponse")
        told = reads(whole.body, ChatCompletion)
        for options in (None, USAGE, EVERY_USAGE) if name == "plain" else (USAGE,):
            chunks = events(await asked(client, CHAT, body, stream=True, **options or {}))
            assert chunks.pop() == (None, "[DONE]")
            _check_chunks([json.loads(data) for _, data in chunks], body.get("n", 1), bool(options))
            for kind, data in chunks:
                assert kind is None
                agrees(json.loads(data), "openai", "CreateChatCompletionStreamResponse")
                reads(data, ChatCompletionChunk)
        assert len(told.choices) == body.get("n", 1)


def _check_chunks(chunks: Sequence[Any], n: int, usage: bool) -> None:
    """What the description says in words: one id and time; the role first; one finish_reason for each
    choice; the usage alone, at the end, and null before where it is asked for."""
    assert len({(each["id"], each["created"], each["model"]) for each in chunks}) == 1
    if usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] > 0
        assert all("usage" in each for each in chunks)
        chunks = chunks[:-1]
    else:
        assert not any(each.get("usage") for each in chunks)
    for index in range(n):
        own = [e for chunk in chunks for e in chunk["choices"] if e["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert not any("role" in each["delta"] for each in own[1:])
        assert [bool(each["finish_reason"]) for each in own].index(True) == len(own) - 1


async def texts(client: TownClient) -> None:
    for name, body in TEXTS.items():
        whole = await asked(client, COMPLETIONS, body)
        assert whole.status == 200, (name, whole.json)
        answers = [whole.json]
        for options in (None, USAGE) if name == "plain" else (USAGE,):
            chunks = events(await asked(client, COMPLETIONS, body, stream=True, **options or {}))
            assert chunks.pop() == (None, "[DONE]")
            found = [json.loads(data) for _, data in chunks]
            assert all("usage" in each for each in found) is bool(options)
            answers += found
        for each in answers:
            _check_text(each)


def _check_text(found: Any) -> None:
    """The description forgets nulls that OpenAI's server writes: the finish_reason of a chunk that is not
    the last, the first token's logprobs with echo, the top_logprobs of `logprobs: 0`, and the usage of
    every chunk but the last."""
    if found.get("usage", "") is None:
        del found["usage"]
    for choice in found["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        scores = choice["logprobs"]
        if scores and scores["top_logprobs"] is None:
            del scores["top_logprobs"]
        elif scores and scores["tokens"] and scores["token_logprobs"][0] is None:
            assert scores["top_logprobs"][0] is None
            scores["token_logprobs"][0], scores["top_logprobs"][0] = 0, {}
    agrees(found, "openai", "CreateCompletionResponse")
    reads(json.dumps(found), Completion)


async def responses(client: TownClient) -> None:
    for name, body in RESPONDED.items():
        whole = await asked(client, RESPONSES, body)
        assert whole.status == 200, (name, whole.json)
        agrees(whole.json, "openai", "Response")
        reads(whole.body, Response)
        _check_events(events(await asked(client, RESPONSES, body, stream=True)))
    id_ = (await asked(client, RESPONSES, RESPONDED["calls"])).json["id"]
    got = await client.ask(f"{RESPONSES}/{id_}")
    agrees(got.json, "openai", "Response")
    agrees((await client.ask(f"{RESPONSES}/{id_}/input_items")).json, "openai", "ResponseItemList")
    counted = await client.ask(f"{RESPONSES}/input_tokens", {"input": "Hello"})
    agrees(counted.json, "openai", "TokenCountsResource")
    gone = await client.ask(f"{RESPONSES}/{id_}", method="DELETE")
    assert gone.status == 200


def _check_events(found: Sequence[tuple[str | None, str]]) -> None:
    """Numbered from 0; an item, and a part of it, is added, told and done before the next; the last event
    has the whole response, which has all that was told."""
    told = [json.loads(data) for _, data in found]
    assert [kind for kind, _ in found] == [each["type"] for each in told]
    assert [each["sequence_number"] for each in told] == list(range(len(told)))
    for each, (_, data) in zip(told, found, strict=True):
        agrees(each, "openai", "ResponseStreamEvent")
        reads(data, ResponseStreamEvent)
    kinds = [each["type"].removeprefix("response.") for each in told]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] in ("completed", "incomplete")
    items: list[Any] = []
    open_: str | None = None
    for kind, each in zip(kinds[2:-1], told[2:-1], strict=True):
        if kind == "output_item.added":
            assert open_ is None
            assert each["output_index"] == len(items)
            open_ = each["item"]["id"]
        elif kind == "output_item.done":
            assert each["item"]["id"] == open_
            items.append(each["item"])
            open_ = None
        else:
            assert each["item_id"] == open_
            assert each["output_index"] == len(items)
    assert open_ is None
    assert told[-1]["response"]["output"] == items


async def messages(client: TownClient) -> None:
    for name, body in USED.items():
        whole = await client.ask(MESSAGES, body, submits=1)
        assert whole.status == 200, (name, whole.json)
        agrees(whole.json, "anthropic", "Message")
        found = events(await client.ask(MESSAGES, body | {"stream": True}, submits=1))
        told = [json.loads(data) for _, data in found]
        assert [kind for kind, _ in found] == [each["type"] for each in told]
        for each in told:
            if each != {"type": "ping"}:
                agrees(each, "anthropic", "MessageStreamEvent")
        kinds = [each["type"] for each in told if each["type"] != "ping"]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        index = -1
        for each in told:
            if each["type"] == "content_block_start":
                index += 1
            if each["type"].startswith("content_block"):
                assert each["index"] == index
    counted = await client.ask(f"{MESSAGES}/count_tokens", {"messages": HELLO})
    agrees(counted.json, "anthropic", "CountMessageTokensResponse")


async def others(client: TownClient) -> None:
    for encoding in ("float", "base64"):
        given = {"input": ["One", "Two"], "encoding_format": encoding}
        found = await client.ask(EMBEDDINGS, given, submits=2)
        assert found.status == 200
        if encoding == "float":  # the description knows no other; the openai package reads both
            agrees(found.json, "openai", "CreateEmbeddingResponse")
            reads(found.body, CreateEmbeddingResponse)
    models = await client.ask("/v1/models")
    agrees(models.json, "openai", "ListModelsResponse")
    one = await client.ask("/v1/models/pretend")
    agrees(one.json, "openai", "Model")
    reads(one.body, Model)


@pytest.mark.parametrize("asks", [chats, texts, responses, messages, others])
def test_answers_and_streams_agree_with_the_descriptions(asks: Any) -> None:
    async def work() -> None:
        town = WordyTown(blocks=256)
        town.wants = pretend_tokenizer().encode(SAID, special=False)
        async with serving(town, template=TEMPLATE) as client:
            await asks(client)

    asyncio.run(work())


KEY = {"authorization": "Bearer secret"}
ERRORS: dict[str, tuple[str, Any, Mapping[str, Any], int]] = {
    "no key": (CHAT, TALK, {"headers": {}}, 401),
    "another site": (CHAT, TALK, {"headers": KEY | {"origin": "https://evil.example"}}, 403),
    "no JSON": (CHAT, b"{", {}, 400),
    "a list": (COMPLETIONS, b"[]", {}, 400),
    "a wrong type": (CHAT, TALK | {"n": "2"}, {}, 400),
    "unsupported": (COMPLETIONS, PROMPT | {"prompt_logprobs": 1}, {}, 400),
    "too long": (COMPLETIONS, PROMPT | {"max_tokens": 4096}, {}, 400),
    "bad grammar": (CHAT, TALK | {"guided_regex": "("}, {}, 400),
    "bad tool": (CHAT, CALLS | {"tools": [{"type": "web_search"}]}, {}, 400),
    "an unknown response": (f"{RESPONSES}/resp_x", None, {}, 404),
    "a previous response": (RESPONSES, ASKED | {"previous_response_id": "resp_x"}, {}, 400),
    "an unknown model": (EMBEDDINGS, {"input": "a", "model": "x"}, {}, 404),
    "an unknown path": ("/v1/images/generations", {}, {}, 404),
    "a wrong method": (CHAT, None, {}, 405),
    "too large": (CHAT, b" " * (5 << 20), {}, 413),
    "no content type": (CHAT, TALK, {"headers": KEY | {"content-type": "text/plain"}}, 400),
    "a wrong message": (MESSAGES, TALK | {"max_tokens": 0}, {}, 400),
    "messages, no key": (MESSAGES, TALK, {"headers": {}}, 401),
    "messages, path": (f"{MESSAGES}/x", {}, {}, 404),
    "messages, method": (MESSAGES, None, {}, 405),
    "messages, too large": (MESSAGES, b" " * (5 << 20), {}, 413),
}


def _check_error(answer: Answer, path: str, status: int, name: str = "") -> None:
    assert answer.status == status, (name, answer.json)
    kind = "anthropic" if path.startswith(MESSAGES) else "openai"
    agrees(answer.json, kind, "ErrorResponse")
    assert answer.headers["content-type"] == "application/json"


def test_errors_have_the_form_of_their_api() -> None:
    async def work() -> None:
        town = WordyTown(blocks=256)
        async with serving(town, api_keys=("secret",), requests_per_key=1) as client:
            for name, (path, body, more, status) in ERRORS.items():
                answer = await client.ask(path, body, **{"headers": KEY} | dict(more))
                _check_error(answer, path, status, name)
            service = client.service
            for path, body in ((CHAT, TALK), (MESSAGES, TALK), (RESPONSES, ASKED)):
                taken = service.quotas.take(service.tenants[0], 0.0)
                answer = await client.ask(path, body, headers=KEY)
                _check_error(answer, path, 429)
                assert int(answer.headers["retry-after"]) >= 1
                taken.close(0, 0.0)
            service.draining = True
            for path, body in ((CHAT, TALK), (MESSAGES, TALK), (RESPONSES, ASKED)):
                _check_error(await client.ask(path, body, headers=KEY), path, 503)

    asyncio.run(work())


def test_failures_have_the_form_of_their_api_whole_and_within_a_stream() -> None:
    async def work() -> None:
        async with serving(WordyTown(blocks=256)) as client:
            ids = (await client.ask("/tokenize", {"messages": HELLO})).json["tokens"]
            client.exchange.town.poisoned.add(ids[0])
            prompt = PROMPT | {"prompt": ids}
            for path, body in ((CHAT, TALK), (COMPLETIONS, prompt), (RESPONSES, ASKED)):
                _check_error(await client.ask(path, body, submits=1), path, 500)
                found = events(await client.ask(path, body | {"stream": True}, submits=1))
                if path == RESPONSES:
                    agrees(json.loads(found[-1][1]), "openai", "ResponseStreamEvent")
                    reads(found[-1][1], ResponseStreamEvent)
                else:
                    assert found.pop() == (None, "[DONE]")
                    agrees(json.loads(found[-1][1]), "openai", "ErrorResponse")
            _check_error(await client.ask(MESSAGES, TALK, submits=1), MESSAGES, 500)
            found = events(await client.ask(MESSAGES, TALK | {"stream": True}, submits=1))
            assert found[-1][0] == "error"
            agrees(json.loads(found[-1][1]), "anthropic", "ErrorResponse")

    asyncio.run(work())
