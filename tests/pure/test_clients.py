"""What real clients send, over ASGI through the whole application: CORS, nulls, fields of other servers,
conversations as templates want them, logprobs that can be added up, and the same count everywhere."""

import asyncio
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from baton.errors import RequestError
from baton.grammar import Grammars, written
from baton.server.api_error import ApiError
from baton.server.fields import GENERATION
from baton.server.schema import ChatRequest, CompletionRequest
from tests.pure.town_app import Answer, TownClient, pretend_tokenizer, serving

COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
PAGE = "http://localhost:5173"
PROMPT = {"prompt": "In the future", "max_tokens": 3}
USER = {"role": "user", "content": "Hello"}
HELLO = {"messages": [USER], "max_tokens": 3}


def served(work: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with serving(**options) as client:
            return await work(client)

    return asyncio.run(run())


# ---- pages of other origins


def test_a_page_of_an_allowed_origin_can_read_every_reply() -> None:
    key = {"authorization": "Bearer secret"}
    preflight = {
        "origin": PAGE, "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }  # fmt: skip

    async def work(client: TownClient) -> None:
        asked = await client.ask(CHAT, method="OPTIONS", headers=preflight)
        assert asked.status == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        mine: dict[str, str] = {"origin": PAGE}
        replies: list[tuple[int, Answer]] = [
            (200, await client.ask("/v1/models", headers=mine | key)),
            (200, await client.ask(CHAT, HELLO, submits=1, headers=mine | key)),
            (200, await client.ask(CHAT, HELLO | {"stream": True}, submits=1, headers=mine | key)),
            (401, await client.ask(CHAT, HELLO, headers=mine)),
            (400, await client.ask(CHAT, {}, headers=mine | key)),
            (400, await client.ask(CHAT, b"{", headers=mine | key)),
            (404, await client.ask("/nowhere", headers=mine | key)),
        ]
        for status, reply in replies:
            assert reply.status == status
            assert reply.headers["access-control-allow-origin"] == PAGE
            assert "X-Request-Id" in reply.headers["access-control-expose-headers"]
        other = {"origin": "https://evil.example"}
        for refused in (
            await client.ask(CHAT, method="OPTIONS", headers=preflight | other),
            await client.ask(CHAT, HELLO, headers=other | key),
        ):
            assert refused.status in (400, 403)
            assert "access-control-allow-origin" not in refused.headers
        evil = preflight | {"host": "evil.example"}
        assert (await client.ask(CHAT, method="OPTIONS", headers=evil)).status == 400
        assert "access-control-allow-origin" not in (await client.ask("/livez")).headers

    served(work, allowed_origins=(PAGE,), api_keys=("secret",))


def test_without_allowed_origins_nobody_is_told_about_them() -> None:
    async def work(client: TownClient) -> None:
        asked = {"origin": PAGE, "access-control-request-method": "POST"}
        assert (await client.ask(CHAT, method="OPTIONS", headers=asked)).status == 403
        assert not [
            name for name in (await client.ask("/livez")).headers if name.startswith("access")
        ]

    served(work)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_wrong_content_type_is_named(kind: str) -> None:
    async def work(client: TownClient) -> None:
        for path in (COMPLETIONS, CHAT, TOKENIZE, "/detokenize"):
            answer = await client.ask(path, {"prompt": "secret"}, headers={"content-type": kind})
            assert answer.status == 400
            message = answer.json["error"]["message"]
            assert "Content-Type" in message
            assert "secret" not in message
            assert (kind or "missing") in message

    served(work)


# ---- nulls and known fields


def optional_fields(kind: type[Any]) -> list[str]:
    return [
        f.alias or name
        for name, f in kind.model_fields.items()
        if not f.is_required() and name != "messages"
    ]


@pytest.mark.parametrize(("kind", "least"), [(CompletionRequest, PROMPT), (ChatRequest, HELLO)])
def test_null_is_what_is_not_given_for_every_optional_field(
    kind: type[Any], least: Mapping[str, Any]
) -> None:
    assert "include_stop_str_in_output" in optional_fields(kind)
    given = kind.model_validate(
        least | {name: None for name in optional_fields(kind) if name not in least}
    )
    assert given == kind.model_validate(least)
    inner = {
        "stream": True,
        "stream_options": {"include_usage": None, "continuous_usage_stats": None},
    }
    assert not kind.model_validate(least | inner).stream_options.include_usage
    form = {
        "type": "json_schema",
        "schema": None,
        "json_schema": {"schema": {}, "name": None, "strict": None},
    }
    assert (
        kind.model_validate(least | {"response_format": form}).response_format.json_schema.name
        == "answer"
    )


def test_the_description_says_so() -> None:
    fields = CompletionRequest.model_json_schema()["properties"]
    assert {"type": "null"} in fields["ignore_eos"]["anyOf"]
    assert fields["ignore_eos"]["default"] is False
    assert "anyOf" not in fields["prompt"]


@pytest.mark.parametrize("name", sorted(GENERATION))
def test_a_known_field_is_refused_by_name_or_changes_nothing(name: str) -> None:
    harmless, instead = GENERATION[name]
    for kind, least in ((CompletionRequest, PROMPT), (ChatRequest, HELLO)):
        for value in (None, "", [], {}, *harmless):
            assert kind.model_validate(least | {name: value}) == kind.model_validate(least)
        for value in ("x", 7, [1], {"a": 1}):
            with pytest.raises(ApiError) as caught:
                kind.model_validate(least | {name: value})
            assert (caught.value.param, caught.value.code) == (name, "unsupported")
            assert name in caught.value.message
            assert instead in caught.value.message


# ---- grammars


@cache
def grammars() -> Grammars:
    folder = Path(__file__).resolve().parents[2] / "baton" / "models" / "demo"
    return Grammars(folder / "tokenizer.json", 2048, (0,))


def fits(fields: Mapping[str, Any], text: str) -> bool:
    """May the answer be this text, to the end?"""
    _, spec = ChatRequest.model_validate(HELLO | fields).grammar_field()
    guide = grammars().open(spec)
    ids = pretend_tokenizer().encode(text, special=False)
    return all(guide.accept(each) for each in ids) and guide.accept(0)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


NUMBER, WORD = {"type": "integer"}, {"type": "string"}
DEFINED = {"$defs": {"B": of(b=NUMBER)}}
REF = {"$ref": "#/$defs/B"}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (of(a=NUMBER), '{"a":1}', '{"a":1,"b":2}'),
        (of(a=of(c=NUMBER)), '{"a":{"c":1}}', '{"a":{"c":1,"d":1}}'),
        ({"type": "array", "items": of(a=NUMBER)}, '[{"a":1}]', '[{"b":1}]'),
        (of(a=NUMBER) | {"required": ["b"]}, '{"a":1,"b":"x"}', '{"a":1,"b":1,"c":1}'),
        (of(a=NUMBER) | {"additionalProperties": True}, '{"a":1,"b":2}', '{"a":"x"}'),
        (of(a=NUMBER) | {"additionalProperties": NUMBER}, '{"b":2}', '{"b":"x"}'),
        ({"type": "object"}, '{"b":2}', "[]"),
        ({"type": "object", "patternProperties": {"^x": NUMBER}}, '{"x1":1}', '{"y":1}'),
        ({"allOf": [of(a=NUMBER), of(b=NUMBER)]}, '{"a":1,"b":2}', '{"a":1,"c":2}'),
        ({"allOf": [of(a=NUMBER) | {"additionalProperties": True}, of()]}, '{"a":1,"c":2}', "[]"),
        ({"anyOf": [of(a=NUMBER), of(b=NUMBER)]}, '{"b":1}', '{"a":1,"b":1}'),
        (of(k=WORD) | {"anyOf": [of(a=NUMBER), of(b=NUMBER)]}, '{"k":"x","b":1}', '{"k":"x","c":1}'),
        (DEFINED | of(x=REF), '{"x":{"b":1}}', '{"x":{"b":1,"c":1}}'),
        (DEFINED | of(y={"allOf": [REF], "default": {}}), '{"y":{"b":1}}', '{"y":{"c":1}}'),
        (DEFINED | of(x=REF, z={"allOf": [REF, of(c=NUMBER)]}), '{"z":{"b":1,"c":1}}', '{"x":{"c":1}}'),
        (of(v=NUMBER, n={"$ref": "#"}), '{"v":1,"n":{"v":2}}', '{"v":1,"n":{"w":2}}'),
        (of(p={"type": "string", "format": "path"}), '{"p":"a/b"}', '{"p":1}'),
        (of(format={"type": "array", "uniqueItems": False}), '{"format":[1,1]}', '{"not":1}'),
        ({"enum": [{"not": 1, "format": "zz"}]}, '{"not":1,"format":"zz"}', "{}"),
        (of(a=NUMBER) | {"unevaluatedProperties": False}, '{"a":1}', '{"b":1}'),
        (of(a=NUMBER) | {"if": {}, "minContains": 1}, '{"a":1}', '{"b":1}'),
    ],
)  # fmt: skip
def test_objects_have_the_keys_that_their_schema_names(
    schema: dict[str, Any], good: str, bad: str
) -> None:
    asked = {"guided_json": schema}
    assert fits(asked, good)
    assert not fits(asked, bad)


@pytest.mark.parametrize(
    ("keyword", "value", "place"),
    [
        ("uniqueItems", True, "/properties/a/items"), ("not", {"type": "null"}, "/properties/a/items"),
        ("contains", NUMBER, "/properties/a/items"),
        ("propertyNames", {"maxLength": 3}, "/properties/a/items"),
        ("dependentRequired", {"a": ["b"]}, "/properties/a/items"),
        ("unevaluatedItems", False, "/properties/a/items"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_named(keyword: str, value: Any, place: str) -> None:
    schema = of(a={"type": "array", "items": {keyword: value}})
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    with pytest.raises(
        ApiError, match=f"keyword {keyword} at {place} cannot be enforced"
    ) as caught:
        ChatRequest.model_validate(HELLO | asked).grammar_field()
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_grammar")


def test_a_condition_is_named() -> None:
    with pytest.raises(ApiError, match="keyword if cannot be enforced"):
        ChatRequest.model_validate(HELLO | {"guided_json": {"if": {}, "then": {}}}).grammar_field()


def test_references_within_references_end() -> None:
    chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, of(a=NUMBER)]} for i in range(500)}
    with pytest.raises(ApiError, match="too many references"):
        ChatRequest.model_validate(
            HELLO | {"guided_json": {"$defs": chain, "allOf": [{"$ref": "#/$defs/d0"}, {}]}}
        ).grammar_field()


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"guided_choice": ["yes", "no", "no way"]}, "no way", "now"),
        ({"structured_outputs": {"choice": ['"', "\n", "é\\"]}}, "é\\", "e"),
        ({"guided_grammar": 'root ::= "yes" | "no" [0-9]+'}, "no12", "no"),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: /[0-9]{2}/'}}, "a12", "a1"),
        ({"structured_outputs": {"json_object": True}}, '{"a":[]}', "[]"),
        ({"guided_json": json.dumps(of(a=NUMBER))}, '{"a":1}', '{"b":1}'),
        ({"response_format": {"type": "json_object", "schema": of(a=NUMBER)}}, '{"a":1}', '{"b":1}'),
    ],
)  # fmt: skip
def test_every_way_to_ask_for_a_form_is_enforced(fields: Any, good: str, bad: str) -> None:
    assert fits(fields, good)
    assert not fits(fields, bad)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ('start: %json {"type": "object"}', "%json is not supported"),
        ("start: " + "(" * 100 + '"a"' + ")" * 100, "nests more than 64 brackets"),
        ("start: a\na: a", "no text fits|cannot be compiled"), ("nonsense", "cannot be compiled"),
        ('start: A{1000000000}\nA: "a"', "cannot go on|cannot be compiled"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be(rules: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        grammars().check(written(rules))
    assert caught.value.code == "invalid_grammar"


# ---- conversations: what chat counts, /tokenize counts


TALKS: list[dict[str, Any]] = [
    {}, {"add_generation_prompt": False}, {"add_special_tokens": True}, {"reasoning_effort": "low"},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"continue_final_message": True}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"documents": [{"text": "d"}]}, {"continue_final_message": True, "add_generation_prompt": False},
    {"messages": [USER, {"role": "tool", "content": None}]},
    {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
]  # fmt: skip
SHOWS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"
    "|{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is false %}quick{% endif %}"
    "{{ reasoning_effort }}{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tokenize_counts_what_chat_counts_and_every_field_counts() -> None:
    async def work(client: TownClient) -> None:
        texts = []
        for fields in TALKS:
            talk = {"messages": [USER]} | fields
            asked = await client.ask(CHAT, talk | {"max_tokens": 1}, submits=1)
            told = (await client.ask(TOKENIZE, talk)).json
            assert told["count"] == asked.json["usage"]["prompt_tokens"], fields
            back = (await client.ask("/detokenize", {"tokens": told["tokens"]})).json
            texts.append(back["prompt"])
        first = "<user>Hello|"
        tools = json.dumps(TALKS[4]["tools"])
        assert texts == [
            first + "<assistant>", first, texts[2], first + "low<assistant>",
            first + tools + "<assistant>", first + "<assistant>", first[:-1], first + "quick<assistant>",
            first + '[{"text": "d"}]<assistant>', first[:-1], "<user>Hello|<tool>|<assistant>",
            "<assistant>no|<assistant>",
        ]  # fmt: skip

    served(work, template=SHOWS)


def test_what_cannot_be_said_to_a_template_is_refused() -> None:
    async def work(client: TownClient) -> None:
        both = {"add_generation_prompt": True, "continue_final_message": True}
        for path in (CHAT, TOKENIZE):
            for fields, param in (
                (both, "continue_final_message"),
                ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
                ({"chat_template": "x"}, "chat_template"),
            ):
                answer = await client.ask(path, {"messages": [USER]} | fields)
                assert (answer.status, answer.json["error"]["param"]) == (400, param)

    served(work)


def test_tokenize_knows_models_and_tokens() -> None:
    async def work(client: TownClient) -> None:
        asked = {"prompt": "In the future", "return_token_strs": True}
        told = (await client.ask(TOKENIZE, asked | {"model": "pretend"})).json
        assert "".join(told["token_strs"]).replace("Ġ", " ") == "In the future"
        assert len(told["token_strs"]) == told["count"]
        for path, body in ((TOKENIZE, asked), ("/detokenize", {"tokens": [1]})):
            answer = await client.ask(path, body | {"model": "gpt-9"})
            assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")

    served(work)


# ---- what is told about tokens


def test_ids_are_told_where_they_are_asked_for() -> None:
    ids = {"return_token_ids": True}

    async def work(client: TownClient) -> None:
        whole = (await client.ask(COMPLETIONS, PROMPT | ids, submits=1)).json
        choice = whole["choices"][0]
        assert len(choice["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
        assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"] == 3
        chat = (await client.ask(CHAT, HELLO | ids, submits=1)).json
        assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
        assert len(chat["choices"][0]["token_ids"]) == 3
        for path, body, prompt, same in (
            (COMPLETIONS, PROMPT, lambda chunk: chunk["choices"][0], choice["token_ids"]),
            (CHAT, HELLO, lambda chunk: chunk, chat["choices"][0]["token_ids"]),
        ):
            found = chunks(await client.ask(path, body | ids | {"stream": True}, submits=1))
            assert [i for each in found for i in each["choices"][0]["token_ids"]] == same
            assert [bool(prompt(each).get("prompt_token_ids")) for each in found].count(True) == 1

    served(work)


def chunks(answer: Answer) -> list[Any]:
    lines = [each for each in answer.body.decode().split("\n") if each.startswith("data: {")]
    return [json.loads(each.removeprefix("data: ")) for each in lines]


def test_usage_comes_with_every_chunk_where_it_is_asked_for() -> None:
    async def work(client: TownClient) -> None:
        for path, body in ((COMPLETIONS, PROMPT), (CHAT, HELLO)):
            options = {"include_usage": True, "continuous_usage_stats": True}
            asked = body | {"stream": True, "stream_options": options}
            found = chunks(await client.ask(path, asked, submits=1))
            counts = [each["usage"]["completion_tokens"] for each in found]
            assert counts == sorted(counts)
            assert counts[-1] == 3
            quiet = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
            found = chunks(await client.ask(path, body | quiet, submits=1))
            assert not any("usage" in each for each in found)

    served(work)


def test_tokens_may_be_told_as_ids() -> None:
    async def work(client: TownClient) -> None:
        ids = {"return_tokens_as_token_ids": True, "return_token_ids": True}
        asked = PROMPT | ids | {"logprobs": 2}
        choice = (await client.ask(COMPLETIONS, asked, submits=1)).json["choices"][0]
        named = [f"token_id:{each}" for each in choice["token_ids"]]
        assert choice["logprobs"]["tokens"] == named
        asked = HELLO | ids | {"logprobs": True}
        choice = (await client.ask(CHAT, asked, submits=1)).json["choices"][0]
        entries = choice["logprobs"]["content"]
        assert [each["token"] for each in entries] == [f"token_id:{i}" for i in choice["token_ids"]]

    served(work)


def test_a_priority_reaches_the_router_and_has_bounds() -> None:
    async def work(client: TownClient) -> None:
        prepared = await client.service.prepare(
            ChatRequest.model_validate(HELLO | {"priority": -7}), stream=False
        )
        prepared.ticket.close()
        assert prepared.submit(0).priority == -7
        for value in (2**31, "1", 0.5, True):
            answer = await client.ask(CHAT, HELLO | {"priority": value})
            assert (answer.status, answer.json["error"]["param"]) == (400, "priority")

    served(work)
