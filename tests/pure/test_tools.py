"""Calls of tools, from the request to the answer, over a simulated cluster."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from threading import current_thread, main_thread
from typing import Any

import jsonschema
import pytest

from baton.errors import RequestError
from baton.server.api_error import ApiError
from baton.server.tools import ANY_OBJECT, MOST_KNOWN, KnownSchemas, OfferedTool, ToolUse
from baton.text import TextStream
from baton.tool_calls import HERMES as PLAIN
from tests.pure.town_app import TownClient, WordyTown, pretend_tokenizer, serving

CHAT = "/v1/chat/completions"
HERMES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or () %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}\n{% endfor %}{{ tools | tojson }}<assistant>"
)
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"], "description": "Where"},
        "days": {"type": "integer"},
    },
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a city", "parameters": CITY},
    },
    {"type": "function", "function": {"name": "now"}},
]
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "max_tokens": 120, "temperature": 0,
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "now"}}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
TAGGED = f"<tool_call>\n{ROME}\n</tool_call>"
TOKENS = len(pretend_tokenizer().encode(TAGGED, special=False))


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
    assert (call["type"], call["function"]["name"]) == ("function", "now")
    assert json.loads(call["function"]["arguments"]) == {}
    assert choice["finish_reason"] == "tool_calls"


def test_who_may_call_says_what_it_likes_and_calls() -> None:
    choice = answer(f"I will look.\n{TAGGED}\n{TAGGED}")
    assert choice["message"]["content"] == "I will look."
    rome = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert [each["function"] for each in choice["message"]["tool_calls"]] == [rome, rome]
    assert len({each["id"] for each in choice["message"]["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("wants", "fields", "content", "calls", "reason"),
    [
        ("Just text.", {}, "Just text.", 0, "stop"),
        ("Look at <tool_cal", {}, "Look at <tool_cal", 0, "stop"),
        (TAGGED, {"tool_choice": "none"}, None, 0, "length"),  # no grammar: the town says words
        (TAGGED, {"parallel_tool_calls": False}, None, 1, "tool_calls"),
        (f"{TAGGED}{TAGGED}", {"max_tokens": 2 * TOKENS - 12}, None, 2, "length"),
        (f"So: {TAGGED}", {"max_tokens": 16}, "So:", 0, "length"),
        (TAGGED, {"stop": ["Rome"]}, None, 1, "stop"),
        (TAGGED, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [TOOLS[0]]}}}, None, 1, "tool_calls"),
        ('{"x": null}', {"response_format": {"type": "json_object"}}, '{"x": null}', 0, "stop"),
        (TAGGED, {"response_format": {"type": "json_object"}}, None, 1, "tool_calls"),
    ],
)  # fmt: skip
def test_what_is_said_is_told_apart(
    wants: str, fields: dict[str, Any], content: str | None, calls: int, reason: str
) -> None:
    choice = answer(wants, **fields)
    if fields.get("tool_choice") != "none":
        assert choice["message"]["content"] == content
    assert len(choice["message"].get("tool_calls", ())) == calls
    assert choice["finish_reason"] == reason


def test_reasoning_calls_and_content_are_three() -> None:
    template = HERMES + "{# </think> #}"
    choice = answer(f"<think>Use <tool_call>?</think>\nYes.\n{TAGGED}", template)
    message = choice["message"]
    assert message["reasoning_content"] == "Use <tool_call>?"
    assert (message["content"], len(message["tool_calls"])) == ("Yes.", 1)
    forced = answer(f"<think>Hm</think>{TAGGED}", template, tool_choice="required")
    assert forced["message"]["reasoning_content"] == "Hm"


def test_each_choice_has_its_own_calls_and_logprobs_go_with_the_tokens() -> None:
    async def work(client: TownClient) -> None:
        fields = ASKED | {
            "n": 2,
            "logprobs": True,
            "tool_choice": NAMED,
            "temperature": 1,
            "seed": 1,
        }
        found = (await client.ask(CHAT, fields, submits=1)).json
        ids = [each["message"]["tool_calls"][0]["id"] for each in found["choices"]]
        assert len(set(ids)) == 2
        spent = sum(len(each["logprobs"]["content"]) for each in found["choices"])
        assert spent == found["usage"]["completion_tokens"]
        streamed = await client.ask(CHAT, fields | {"stream": True}, submits=1)
        events = [
            json.loads(each[6:]) for each in streamed.body.decode().split("\n") if each[6:7] == "{"
        ]
        logprobs = [each["choices"][0]["logprobs"] for each in events]
        assert sum(len(each["content"]) for each in logprobs if each) == spent

    served(work, TAGGED)


def test_the_parser_can_be_chosen_and_mistral_gets_ids_of_nine_characters() -> None:
    async def work(client: TownClient) -> None:
        message = (await client.ask(CHAT, ASKED, submits=1)).json["choices"][0]["message"]
        assert len(message["tool_calls"][0]["id"]) == 9
        assert message["tool_calls"][0]["id"].isalnum()

    served(work, f"[TOOL_CALLS] [{ROME}]", tool_call_parser="mistral")


def test_a_conversation_goes_on_after_a_call() -> None:
    async def work(client: TownClient) -> None:
        said = (await client.ask(CHAT, ASKED, submits=1)).json["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "Sunny"}
        talk = {"messages": [*ASKED["messages"], said, result], "tools": TOOLS}
        ids = (await client.ask("/tokenize", talk)).json["tokens"]
        text = (await client.ask("/detokenize", {"tokens": ids})).json["prompt"]
        assert f"<tool_call>{ROME}</tool_call><tool>Sunny" in text

    served(work, TAGGED)


def test_special_tokens_before_a_call_do_not_hide_it() -> None:
    async def work(client: TownClient) -> None:
        fields = ASKED | {"skip_special_tokens": False, "tool_choice": "required"}
        prepared = await client.service.prepare_json(fields, tenant="", size=1)
        prepared.ticket.close()
        tokenizer = client.service.tokenizer
        said = [min(tokenizer.special_ids), *tokenizer.encode(ROME, special=False)]
        stream = TextStream(tokenizer, prepared.prompts[0], prepared.params[0])
        assert stream.push(said) + stream.finish() == ROME

    served(work, template="{# tools #}{{ messages[0].content }}")


ONE_CALL = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if not m.tool_calls | length == 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "<call>{{ m.tool_calls[0].function.name }}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}{{ tools | length }}{# <tool_call> #}"
)


def test_a_template_that_takes_one_call_gets_one_a_turn() -> None:
    async def work(client: TownClient) -> None:
        said = (await client.ask(CHAT, ASKED, submits=1)).json["choices"][0]["message"]
        assert len(said["tool_calls"]) == 1
        calls = [{"id": i, "type": "function", "function": {"name": f"f{i}", "arguments": "{}"}}
                 for i in "abc"]  # fmt: skip
        told = [("b", "B"), ("?", "C"), ("a", "A1"), ("a", "A2"), ("?", "D")]
        turns = [
            *ASKED["messages"],
            {"role": "assistant", "content": None, "tool_calls": calls},
            *({"role": "tool", "tool_call_id": i, "content": text} for i, text in told),
            {"role": "user", "content": "So?"},
        ]
        found = await client.ask("/tokenize", {"messages": turns, "tools": TOOLS})
        assert found.status == 200, found.json
        text = (await client.ask("/detokenize", {"tokens": found.json["tokens"]})).json["prompt"]
        results = "<call>fa<tool>A1<tool>A2<call>fb<tool>B<call>fc<tool>C<tool>D<user>So?"
        assert results in text

    served(work, f"{TAGGED}\n{TAGGED}", template=ONE_CALL)


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


LARGE = {"type": "object", "properties": {"a": {"enum": ["x" * 4000]}}}
BAD = {"type": "object", "properties": {"a": {"not": {}}}}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "there are no tools: give tools"),
    ({"tools": [], "tool_choice": NAMED}, "tool_choice", "there are no tools"),
    ({"tool_choice": tool("rain")}, "tool_choice", "'rain', which is none of the tools: 'weather'"),
    ({"tool_choice": "any"}, "tool_choice", 'must be "none", "auto", "required"'),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
     "tool_choice", "tool_choice must be"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [tool("x")]}}}, "tool_choice", "names 'x'"),
    ({"tools": [tool(), tool("g"), tool()]}, "tools", r"tools\[2\] has the name 'f' of a tool"),
    ({"tools": [{"type": "x"}]}, "tools", r'tools\[0\].type must be function, got "x"'),
    ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\].function must be an object"),
    ({"tools": [tool("")]}, "tools", r"tools\[0\].function.name must be a text of 1 to 256"),
    ({"tools": [tool(parameters=[])]}, "tools", "parameters must be a JSON schema"),
    ({"tools": [tool(strict=1)]}, "tools", "strict must be true or false"),
    ({"tools": [tool("g"), tool(parameters=BAD)]}, "tools",
     r"tools\[1\].function.parameters: .*keyword not at /properties/a cannot be .*strict: false"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools", 'an object, not of type "string"'),
    ({"tools": [tool(str(i), parameters=LARGE) for i in range(20)]}, "tools", "65536 are the limit"),
    ({"guided_regex": "a"}, "guided_regex", "guided_regex and tools exclude each other"),
    ({"allowed_token_ids": [5]}, "allowed_token_ids", "allowed_token_ids and tools may exclude"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "bool"),
]  # fmt: skip


def test_what_is_wrong_is_named() -> None:
    async def work(client: TownClient) -> None:
        for fields, param, told in WRONG:
            refused = await client.ask(CHAT, ASKED | fields)
            error = refused.json["error"]
            assert (refused.status, error["param"]) == (400, param), (fields, error)
            assert re.search(told, error["message"]), (fields, error)

    served(work, template="{# tools #}{{ messages[0].content }}")


def test_arguments_are_any_object_where_the_client_says_so() -> None:
    """Its schema cannot be enforced."""
    given = [tool(parameters=BAD, strict=False)]
    choice = answer('<tool_call>{"name": "f", "arguments": {"b": [1]}}</tool_call>', tools=given)
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"b": [1]}'


def offered(count: int, values: int, *, strict: bool | None = None) -> list[OfferedTool]:
    """Tools whose schemas have so many thousand characters, and a description that does not count."""
    described = {"description": "d" * 9_000, "type": "object"}
    enums = [[f"{i}" * 1000 + f"{j}" for j in range(values)] for i in range(count)]
    schemas = [described | {"properties": {"a": {"enum": each}}} for each in enums]
    return [OfferedTool(str(i), each, strict, "t") for i, each in enumerate(schemas)]


def test_no_schema_is_compiled_if_all_are_too_large() -> None:
    checked: list[str] = []
    with pytest.raises(
        ApiError, match=r"of these 7 tools have 7\d{4} bytes .*, 65536 are the limit"
    ):
        KnownSchemas(checked.append).enforced(offered(7, 10, strict=False), PLAIN)
    assert not checked
    assert len(KnownSchemas(checked.append).enforced(offered(6, 10), PLAIN)) == 6
    assert len(checked) == 6


@pytest.mark.parametrize("fails", [False, True])
def test_a_schema_is_compiled_once_whether_it_can_be_enforced_or_not(fails: bool) -> None:
    checked: list[str] = []

    def check(spec: str) -> None:
        checked.append(spec)
        if fails:
            raise RequestError("too slow", code="invalid_grammar")

    schemas = KnownSchemas(check)
    found = [schemas.enforced(offered(2, 10, strict=False), PLAIN) for _ in range(2)]
    assert len(checked) == 2
    assert found[0] == found[1]
    assert (found[0][0] == ANY_OBJECT) is fails
    if fails:
        with pytest.raises(ApiError, match="too slow; or give the tool strict: false"):
            schemas.enforced(offered(1, 10), PLAIN)
    for each in range(MOST_KNOWN):
        schemas.enforced([OfferedTool("f", {"properties": {f"n{each}": {}}}, False, "t")], PLAIN)
    checked.clear()
    schemas.enforced(offered(1, 10, strict=False), PLAIN)
    assert len(checked) == 1  # forgotten: so many are remembered


def test_a_name_that_cannot_be_written_is_refused_whatever_strict_says() -> None:
    async def work(client: TownClient) -> None:
        for strict in (None, False):
            refused = await client.ask(CHAT, ASKED | {"tools": [tool("my tool", strict=strict)]})
            error = refused.json["error"]
            assert (refused.status, error["param"]) == (400, "tools")
            assert error["message"].startswith("tools[0].function.name: the tool's name 'my tool'")
            assert "strict" not in error["message"]

    served(work, tool_call_parser="kimi_k2")


def test_schemas_are_not_read_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    read = ToolUse.reading

    def reading(*given: Any) -> Any:
        threads.append(current_thread())
        return read(*given)

    monkeypatch.setattr(ToolUse, "reading", reading)
    answer(TAGGED)
    assert threads
    assert main_thread() not in threads
