"""What HTTP clients see, frozen: answers and streams to the byte, errors without the message's text,
the fields of requests, the names of the metrics. Ids and times are replaced by constants.

The requests go over ASGI through the whole application to a simulated cluster (town_app.py). To record an
intended change, see golden.py.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.pure.golden import check
from tests.pure.town_app import CONTEXT, Answer, TownClient, WordyTown, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
UNSEEN = {"content-length", "date", "server"}
PROMPT = {"prompt": "In the future", "max_tokens": 6}  # " litng ord oldidd less"
OLD = 424  # the token id of " old"
LONG = {"prompt": list(range(300, 380)), "max_tokens": 3}
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
TALK = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "day"}]},
        {"role": "assistant", "content": "it rained"},
        {"role": "user", "content": "And then?", "name": "Ann"},
    ],
    "max_completion_tokens": 4,
}  # fmt: skip
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

ASKED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "completion": (COMPLETIONS, PROMPT),
    "completion of token ids": (
        COMPLETIONS,
        PROMPT | {"prompt": [301, 302, 303], "model": "pretend"},
    ),
    "completion without max_tokens": (COMPLETIONS, {"prompt": "The end"}),
    "completion of two texts": (COMPLETIONS, PROMPT | {"prompt": ["Once upon a time", "The end"]}),
    "completion of two lists": (COMPLETIONS, PROMPT | {"prompt": [[301, 302], [303]], "n": 2}),
    "completion, n": (COMPLETIONS, PROMPT | {"n": 2}),
    "completion, n, long prompt": (COMPLETIONS, LONG | {"n": 2}),
    "completion, logprobs": (COMPLETIONS, PROMPT | {"logprobs": 2}),
    "completion, logprobs 0": (COMPLETIONS, PROMPT | {"logprobs": 0}),
    "completion, echo": (COMPLETIONS, PROMPT | {"echo": True}),
    "completion, echo, token ids": (COMPLETIONS, PROMPT | {"prompt": [301, 302], "echo": True}),
    "completion, echo, logprobs": (COMPLETIONS, PROMPT | {"echo": True, "logprobs": 1}),
    "completion, echo alone": (
        COMPLETIONS,
        PROMPT | {"echo": True, "logprobs": 1, "max_tokens": 0},
    ),
    "completion, stop": (COMPLETIONS, PROMPT | {"stop": " old"}),
    "completion, stop within a token": (COMPLETIONS, PROMPT | {"stop": ["never", "di"]}),
    "completion, stop in the output": (
        COMPLETIONS,
        PROMPT | {"stop": [" old"], "include_stop_str_in_output": True},
    ),
    "completion, min_tokens": (COMPLETIONS, PROMPT | {"stop": " ord", "min_tokens": 3}),
    "completion, stop token": (COMPLETIONS, PROMPT | {"stop_token_ids": [OLD]}),
    "completion, stop token in the output": (
        COMPLETIONS,
        PROMPT | {"stop_token_ids": [OLD], "include_stop_str_in_output": True},
    ),
    "completion, unknown field": (COMPLETIONS, PROMPT | {"top_a": 1, "user": "Ann"}),
    "completion, stream": (COMPLETIONS, PROMPT | STREAM),
    "completion, stream, usage": (COMPLETIONS, PROMPT | USAGE),
    "completion, stream, n": (COMPLETIONS, PROMPT | STREAM | {"n": 2, "max_tokens": 3}),
    "completion, stream, logprobs": (COMPLETIONS, PROMPT | STREAM | {"logprobs": 1}),
    "completion, stream, echo": (COMPLETIONS, PROMPT | STREAM | {"echo": True}),
    "completion, stream, echo, logprobs": (
        COMPLETIONS,
        PROMPT | STREAM | {"echo": True, "logprobs": 0, "max_tokens": 2},
    ),
    "completion, stream, stop": (COMPLETIONS, PROMPT | STREAM | {"stop": "di"}),
    "chat": (CHAT, HELLO),
    "chat, several turns": (CHAT, TALK),
    "chat, n": (CHAT, HELLO | {"n": 2}),
    "chat, stop": (CHAT, HELLO | {"stop": "e"}),
    "chat, logprobs": (CHAT, HELLO | {"logprobs": True}),
    "chat, top_logprobs": (CHAT, HELLO | {"logprobs": True, "top_logprobs": 2, "max_tokens": 2}),
    "chat, stream": (CHAT, HELLO | STREAM),
    "chat, stream, usage": (CHAT, TALK | USAGE),
    "chat, stream, n": (CHAT, HELLO | STREAM | {"n": 2, "max_tokens": 2}),
    "chat, stream, top_logprobs": (
        CHAT,
        HELLO | STREAM | {"logprobs": True, "top_logprobs": 1, "max_tokens": 2},
    ),
}
"""Name: path and body. Each becomes as many requests as it has prompts, n times."""

STATE = ("/livez", "/health", "/ping", "/readyz", "/version", "/load", "/v1/models",
         "/v1/models/pretend")  # fmt: skip

BAD_COMPLETIONS: dict[str, Mapping[str, Any]] = {
    "no prompt": {"max_tokens": 3},
    "an empty prompt": {"prompt": ""},
    "an empty list of prompts": {"prompt": []},
    "a prompt of another type": {"prompt": 3},
    "a token id outside the vocabulary": {"prompt": [1, 99999]},
    "too long": {"prompt": "a", "max_tokens": CONTEXT},
    "too long a list": {"prompt": [300] * (CONTEXT + 1)},
    "an unknown model": PROMPT | {"model": "gpt-9"},
    "n 0": PROMPT | {"n": 0},
    "n as text": PROMPT | {"n": "2"},
    "temperature 3": PROMPT | {"temperature": 3},
    "max_tokens 0 without echo": PROMPT | {"max_tokens": 0},
    "min_tokens above max_tokens": PROMPT | {"min_tokens": 9},
    "logprobs 21": PROMPT | {"logprobs": 21},
    "stream_options without stream": PROMPT | {"stream_options": {"include_usage": True}},
    "best_of": PROMPT | {"best_of": 2},
    "suffix": PROMPT | {"suffix": "x"},
    "five stop strings": PROMPT | {"stop": ["a", "b", "c", "d", "e"]},
    "an empty stop string": PROMPT | {"stop": ""},
    "a stop token id outside the vocabulary": PROMPT | {"stop_token_ids": [99999]},
    "a logit_bias id outside the vocabulary": PROMPT | {"logit_bias": {"99999": 1}},
    "a logit_bias that is no number": PROMPT | {"logit_bias": {"1": "x"}},
    "no allowed token": PROMPT | {"allowed_token_ids": []},
    "two grammars": PROMPT | {"guided_regex": "a", "guided_json": {}},
    "a bad pattern": PROMPT | {"guided_regex": "("},
    "a bad request id": PROMPT | {"request_id": "two words"},
}
BAD_CHATS: dict[str, Mapping[str, Any]] = {
    "no messages": {"max_tokens": 3},
    "an empty list of messages": {"messages": []},
    "no content": {"messages": [{"role": "user"}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "max_tokens 0": HELLO | {"max_tokens": 0},
    "top_logprobs 21": HELLO | {"logprobs": True, "top_logprobs": 21},
    "top_logprobs alone": HELLO | {"top_logprobs": 2},
    "response_format": HELLO | {"response_format": {"type": "xml"}},
    "a schema that is missing": HELLO | {"response_format": {"type": "json_schema"}},
}


def submits(body: Mapping[str, Any]) -> int:
    """Requests of the router that it becomes at once."""
    prompt = body.get("prompt")
    if prompt == LONG["prompt"]:
        return 1  # the others follow when the first speaks
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return int(body.get("n", 1)) * (len(prompt) if several and isinstance(prompt, list) else 1)


def calm(text: str) -> str:
    """Without what differs every time."""
    text = re.sub(r'("created": ?)\d+', r"\g<1>0", text)
    text = re.sub(r"\b(cmpl|chatcmpl)-[0-9a-f]{24}\b", r"\1-<24 hex>", text)
    text = re.sub(r"\b(cmpl|chatcmpl)-(\S*?)-[0-9a-f]{8}\b", r"\1-\2-<8 hex>", text)
    return re.sub(r"^[0-9a-f]{16}$", "<16 hex>", text)


def without_words(error: Mapping[str, Any]) -> dict[str, Any]:
    """An error's fields; of its message that there is one."""
    assert isinstance(error["message"], str)
    assert error["message"]
    return {**error, "message": "<words>"}


def head(answer: Answer) -> dict[str, Any]:
    found = {name: calm(value) for name, value in answer.headers.items() if name not in UNSEEN}
    return {"status": answer.status, "headers": dict(sorted(found.items()))}


def line_of(text: str) -> str:
    """One line of a stream or of an answer."""
    if text.startswith('data: {"error"'):
        event = json.loads(text.removeprefix("data: "))
        return f"data: {json.dumps({'error': without_words(event['error'])})}"
    return calm(text)


def described(answer: Answer) -> dict[str, Any]:
    """To the byte, line by line."""
    return head(answer) | {"body": [line_of(each) for each in answer.body.decode().split("\n")]}


def refused(answer: Answer) -> dict[str, Any]:
    content = answer.json
    assert list(content) == ["error"]
    return head(answer) | {"error": without_words(content["error"])}


async def all_asked(client: TownClient) -> dict[str, Any]:
    found = {}
    for name, (path, body) in ASKED.items():
        client.fresh()
        answer = await client.ask(path, body, submits=submits(body))
        found[name] = {"asked": {path: body}} | described(answer)
    given = {"x-request-id": "mine-7"}
    own = await client.ask(COMPLETIONS, PROMPT, submits=1, headers=given)
    found["completion, own X-Request-Id"] = described(own)
    own = await client.ask(CHAT, HELLO | {"request_id": "mine-8"}, submits=1)
    found["chat, own request_id"] = described(own)
    return found


async def all_state(client: TownClient) -> dict[str, Any]:
    found = {f"GET {path}": described(await client.ask(path)) for path in STATE}
    asked: Sequence[tuple[str, Mapping[str, Any]]] = (
        ("/tokenize", {"prompt": "In the future"}),
        ("/tokenize", {"messages": HELLO["messages"]}),
        ("/detokenize", {"tokens": [301, 302]}),
    )
    for path, body in asked:
        found[f"{path} {json.dumps(body)}"] = described(await client.ask(path, body))
    return found


async def all_refused(client: TownClient) -> dict[str, Any]:
    async def ask(*given: Any, **more: Any) -> dict[str, Any]:
        return refused(await client.ask(*given, **more))

    found = {
        f"completion: {name}": await ask(COMPLETIONS, b) for name, b in BAD_COMPLETIONS.items()
    }
    found |= {f"chat: {name}": await ask(CHAT, body) for name, body in BAD_CHATS.items()}
    for name, body in {
        "no body": b"", "half a JSON": b'{"prompt":', "a list": b"[]", "no UTF-8": b'{"prompt": "\xff"}',
        "nested too deeply": b"[" * 40 + b"]" * 40, "too large": b" " * (5 << 20),
    }.items():  # fmt: skip
        found[f"body: {name}"] = await ask(COMPLETIONS, body)
    compressed = {"content-encoding": "gzip"}
    found["body: compressed"] = await ask(COMPLETIONS, PROMPT, headers=compressed)
    found["path: unknown"] = await ask("/v1/images/generations", PROMPT)
    found["path: unknown model"] = await ask("/v1/models/gpt-9")
    found["method: GET"] = await ask(COMPLETIONS)
    found["method: DELETE"] = await ask("/v1/models", method="DELETE")
    found["host: another"] = await ask("/v1/models", headers={"host": "evil.example"})
    found["origin: another"] = await ask("/v1/models", headers={"origin": "https://evil.example"})
    found["tokenize: nothing"] = await ask("/tokenize", {})
    found["detokenize: outside the vocabulary"] = await ask("/detokenize", {"tokens": [99999]})
    return found


async def all_failed() -> dict[str, Any]:
    """What goes wrong behind the server, and who is not let in."""
    broken = WordyTown()
    broken.poisoned.add(301)
    body = PROMPT | {"prompt": [301, 302]}
    async with serving(broken) as client:
        failed = await client.ask(COMPLETIONS, body, submits=1)
        stream = await client.ask(COMPLETIONS, body | STREAM, submits=1)
    found = {"failed": refused(failed), "failed, stream": described(stream)}
    async with serving(WordyTown(decodes=0)) as client:
        found["not ready"] = refused(await client.ask(COMPLETIONS, PROMPT))
        found["not ready, health"] = refused(await client.ask("/health"))
        readiness = await client.ask("/readyz")
        found["not ready, readyz"] = head(readiness) | {
            "body": {**readiness.json, "why_not": "<words>"}
        }
    async with serving(api_keys=("secret",)) as client:
        found["no key"] = refused(await client.ask(COMPLETIONS, PROMPT))
        wrong = {"authorization": "Bearer other"}
        found["a wrong key"] = refused(await client.ask(COMPLETIONS, PROMPT, headers=wrong))
        good = {"authorization": "Bearer secret"}
        answer = await client.ask(COMPLETIONS, PROMPT, submits=1, headers=good)
        found["a good key"] = {"status": answer.status}
    return found


def fields_of(schema: Any, whole: Any, name: str = "") -> Any:
    """A JSON schema without prose and without the names of classes: references are followed."""
    if isinstance(schema, list):
        return [fields_of(each, whole) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return fields_of(whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]], whole)
    if name == "properties":
        return {key: fields_of(each, whole) for key, each in schema.items()}
    prose = ("title", "description")
    return {key: fields_of(each, whole, key) for key, each in schema.items() if key not in prose}


async def all_fields(client: TownClient) -> dict[str, Any]:
    """Routes, and the fields of what they take, as /openapi.json lists them."""
    whole = (await client.ask("/openapi.json")).json
    found: dict[str, Any] = {}
    for path, methods in whole["paths"].items():
        for method, route in methods.items():
            body = route.get("requestBody", {}).get("content", {})
            found[f"{method.upper()} {path}"] = {
                kind: fields_of(each["schema"], whole) for kind, each in body.items()
            }
    return found


async def all_metrics(client: TownClient) -> dict[str, Any]:
    """Types, and the labels of every series."""
    types, series = {}, {}
    for line in (await client.ask("/metrics")).body.decode().splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split()
            types[name] = kind
        elif not line.startswith("#"):
            name, _, labels = line.rpartition(" ")[0].partition("{")
            series[name] = re.findall(r'(\w+)="', labels)
    return {"types": types, "series": series}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Everything, asked in this order."""

    async def ask() -> dict[str, Any]:
        async with serving() as client:
            all_found = {
                "http_answers.json": await all_asked(client),
                "http_state.json": await all_state(client),
                "http_refusals.json": await all_refused(client),
                "http_fields.json": await all_fields(client),
                "http_metrics.json": await all_metrics(client),
            }
        return all_found | {"http_failures.json": await all_failed()}

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "name", ["answers", "state", "refusals", "failures", "fields", "metrics"]
)  # fmt: skip
def test_what_clients_see_is_as_recorded(found: dict[str, Any], name: str) -> None:
    check(f"http_{name}.json", found[f"http_{name}.json"])
