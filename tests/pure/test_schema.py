"""What may be asked over HTTP: each field at its limits, ids, and anything at all. A request goes the way
of the server: json.loads, the model, its params, check_request."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from baton import grammar
from baton.errors import RequestError
from baton.params import GenerationParams, Limits, check_ids, check_request
from baton.server.api_error import ApiError, body, from_request_error, from_validation_error
from baton.server.bodies import JsonLimits, JsonScan
from baton.server.schema import (
    ChatRequest,
    CompletionRequest,
    Defaults,
    DetokenizeRequest,
    TokenizeRequest,
)
from sampler.params import SamplingParams

LIMITS = Limits(context=2048, vocabulary=1000)
WIDE = Limits(context=2**31, vocabulary=2**31)
DEFAULTS = SamplingParams(min_p=0.25)
COMPLETION = {"prompt": "x"}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def answer(kind: type[BaseModel], raw: str | bytes, limits: Limits = LIMITS) -> Any:
    """The GenerationParams (for /tokenize and /detokenize: the model), or the ApiError."""
    try:
        asked = kind.model_validate(json.loads(raw))
        if isinstance(asked, DetokenizeRequest):
            check_ids(asked.tokens, limits.vocabulary, param="tokens")
        if not isinstance(asked, CompletionRequest | ChatRequest):
            return asked
        params = asked.params(Defaults(DEFAULTS, limits.context))
        for prompt in asked.prompts if isinstance(asked, CompletionRequest) else ("x",):
            ids = (1,) if isinstance(prompt, str) else prompt
            check_request(ids, replace(params, max_new_tokens=1, min_tokens=0), limits)
        return params
    except ValidationError as error:
        found = from_validation_error(error)
    except RequestError as error:
        found = from_request_error(error)
    except ApiError as error:
        found = error
    sent = body(found)["error"]
    assert found.status == 400
    assert 0 < len(sent["message"]) <= 300
    assert "\n" not in sent["message"]
    json.dumps(sent, ensure_ascii=False).encode()
    return found


def complete(**fields: Any) -> Any:
    return answer(CompletionRequest, json.dumps(COMPLETION | fields))


def sampling(**given: Any) -> SamplingParams:
    """What is given over the defaults."""
    return replace(DEFAULTS, **given)


def chat(**fields: Any) -> Any:
    return answer(ChatRequest, json.dumps(CHAT | fields))


def good(found: Any) -> GenerationParams:
    assert isinstance(found, GenerationParams), found
    return found


def refused(found: Any, param: str | None, code: str | None = None) -> str:
    assert isinstance(found, ApiError), f"{param} was let in"
    assert (found.param, found.code) == (param, code), found.message
    return found.message


# ---- B1: every number at its limits ------------------------------------------------------------

# name, least, most, of which kind, what must stand beside it
NUMBERS: list[tuple[str, float, float, type, str, dict[str, Any]]] = [
    ("n", 1, 16, int, "both", {}),
    ("temperature", 0, 2, float, "both", {}),
    ("top_p", 5e-324, 1, float, "both", {}),  # above 0
    ("top_k", -1, 2**31 - 1, int, "both", {}),
    ("min_p", 0, 1, float, "both", {}),
    ("repetition_penalty", 1e-30, 1e30, float, "both", {}),
    ("presence_penalty", -2, 2, float, "both", {}),
    ("frequency_penalty", -2, 2, float, "both", {}),
    ("seed", -(2**63), 2**63 - 1, int, "both", {}),
    ("min_tokens", 0, 2**31 - 1, int, "both", {"max_tokens": 2**31 - 1}),
    ("best_of", 2, 2, int, "both", {"n": 2}),
    ("max_tokens", 1, 2**31 - 1, int, "both", {}),
    ("max_tokens", 0, 2**31 - 1, int, "completion", {"echo": True}),
    ("logprobs", 0, 20, int, "completion", {}),
    ("max_completion_tokens", 1, 2**31 - 1, int, "chat", {}),
    ("top_logprobs", 0, 20, int, "chat", {"logprobs": True}),
]
EVERYWHERE = ("2147483648", "9007199254740992", "9223372036854775808", "18446744073709551616",
              "-0.0", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", '"1"', "true", "false",
              "null", "[]", "{}", "0.5", "1.0", "1" + "0" * 400)  # fmt: skip


def written(least: float, most: float) -> Iterator[str]:
    yield from (json.dumps(each) for each in (least - 1, least, most, most + 1))
    yield from EVERYWHERE


def fits(value: Any, name: str, least: float, most: float, kind: type) -> bool:
    """The rule again, in one line each."""
    if value is None:
        return True
    if type(value) is not int and not (kind is float and type(value) is float):
        return False
    return bool(least <= value <= most)


@pytest.mark.parametrize(
    ("kind", "name", "least", "most", "number", "beside"),
    [
        pytest.param(kind, *row[:4], row[5], id=f"{way}-{row[0]}-{row[1]:g}")
        for way, kind in (("completion", CompletionRequest), ("chat", ChatRequest))
        for row in NUMBERS
        if row[4] in (way, "both")
    ],
)
def test_a_number_is_taken_within_its_limits_alone(
    kind: type[BaseModel],
    name: str,
    least: float,
    most: float,
    number: type,
    beside: dict[str, Any],
) -> None:
    first = json.dumps((COMPLETION if kind is CompletionRequest else CHAT) | beside)[:-1]
    taken = 0
    for text in written(least, most):
        found = answer(kind, f'{first}, "{name}": {text}}}', WIDE)
        if fits(json.loads(text), name, least, most, number):
            good(found)
            taken += 1
        else:
            assert name in refused(found, name), text
    assert taken >= 2


@pytest.mark.parametrize(
    "name",
    ["stream", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
     "add_special_tokens", "echo"],
)  # fmt: skip
def test_a_switch_is_true_or_false(name: str) -> None:
    good(complete(**{name: True}))
    good(complete(**{name: False}))
    wrong: tuple[Any, ...] = (0, 1, "true", "", [], {}, 0.0)
    for value in wrong:
        refused(complete(**{name: value}), name)


# ---- B2: ids ------------------------------------------------------------------------------------

IDS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda i: answer(CompletionRequest, f'{{"prompt": [1, {i}]}}'),
    "prompt, a list of lists": lambda i: answer(CompletionRequest, f'{{"prompt": [[1], [2, {i}]]}}'),
    "stop_token_ids": lambda i: answer(CompletionRequest, f'{{"prompt": "", "stop_token_ids": [{i}]}}'),
    "allowed_token_ids": lambda i: answer(
        CompletionRequest, f'{{"prompt": "", "allowed_token_ids": [{i}]}}'
    ),
    "tokens": lambda i: answer(DetokenizeRequest, f'{{"tokens": [{i}]}}'),
    "logit_bias": lambda i: answer(
        CompletionRequest, f'{{"prompt": "", "logit_bias": {{{json.dumps(i)}: 1}}}}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", IDS)
@pytest.mark.parametrize(
    "token", ["-1", "1000", str(2**31), str(2**63), str(2**64), "1.0", "1e3", "null", "true", '"1"', "[]"]
)  # fmt: skip
def test_an_id_is_a_token_of_the_model(field: str, token: str) -> None:
    refused(IDS[field](token), field.partition(",")[0])


def test_the_first_and_the_last_id_are_good() -> None:
    for field in IDS:
        for token in ("0", "999"):
            assert not isinstance(IDS[field](token), ApiError)


def test_allowed_ids_are_at_least_one_and_few() -> None:
    found = good(complete(allowed_token_ids=[7, 2, 7]))
    assert found.sampling == sampling(allowed_token_ids=(7, 2, 7))
    refused(complete(allowed_token_ids=[]), "allowed_token_ids")
    for count in (1024, 1025):
        raw = json.dumps(COMPLETION | {"allowed_token_ids": [0] * count})
        assert isinstance(answer(CompletionRequest, raw, WIDE), ApiError) == (count > 1024)


@pytest.mark.parametrize(
    "key", ["", " 1", "1 ", "+1", "0x1", "1_0", "١", "a" * 10**5, "\ud800", "9" * 11]
)
def test_a_bias_is_for_a_decimal_id(key: str) -> None:
    refused(complete(logit_bias={key: 1}), "logit_bias")


def test_biases_are_clamped_and_few() -> None:
    found = good(complete(logit_bias={"1": 10**30, "2": -101, "03": 0.5}))
    assert found.sampling == sampling(logit_bias=((1, 100.0), (2, -100.0), (3, 0.5)))
    for count in (1024, 1025):
        raw = json.dumps(COMPLETION | {"logit_bias": {str(i): 0 for i in range(count)}})
        assert isinstance(answer(CompletionRequest, raw, WIDE), ApiError) == (count > 1024)
    refused(complete(logit_bias={"1": 1, "01": 2}), "logit_bias")
    wrong: tuple[Any, ...] = (float("nan"), float("inf"), True, "1", None, [])
    for value in wrong:
        refused(complete(logit_bias={"1": value}), "logit_bias")


# ---- the other rules ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
        ({"prompt": {}}, "prompt"), ({"prompt": 1}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"), ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [[1]] * 257}, "prompt"), ({"prompt": [[1], "a"]}, "prompt"),
        ({"stop": ""}, "stop"), ({"stop": ["a", ""]}, "stop"), ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 257}, "stop"), ({"stop": 1}, "stop"), ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"), ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"), ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"best_of": 2}, "best_of"), ({"suffix": "a"}, "suffix"),
        ({"request_id": "a" * 129}, "request_id"), ({"request_id": "a\n"}, "request_id"),
        ({"request_id": ""}, "request_id"), ({"cache_salt": "a" * 257}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"), ({"model": "a" * 257}, "model"),
        ({"model": 1}, "model"), ({"logprobs": True}, "logprobs"),
    ],
)  # fmt: skip
def test_a_completion_is_refused(fields: dict[str, Any], param: str) -> None:
    refused(complete(**fields), param)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", None), ({"messages": "x"}, "messages", None),
        ({"messages": [{"content": "x"}]}, "messages", None),
        ({"messages": [{"role": "", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": 1}]}, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", None),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", None),
        ({"top_logprobs": 1}, "top_logprobs", None), ({"logprobs": 1}, "logprobs", None),
        ({"min_tokens": 2049}, "min_tokens", None), ({"tools": [1]}, "tools", None),
        ({"tools": [{}], "tool_choice": "required"}, "tools", None),
        ({"tools": [{}], "tool_choice": {"type": "function"}}, "tool_choice", None),
    ],
)  # fmt: skip
def test_a_conversation_is_refused(fields: dict[str, Any], param: str, code: str | None) -> None:
    refused(chat(**fields), param, code)


def test_a_prompt_longer_than_the_context_is_told_so() -> None:
    good(complete(prompt=[1] * 2047))
    text = refused(complete(prompt=[1] * 2048), "max_tokens", "context_length_exceeded")
    assert "2,048 tokens" in text
    assert "2,048" in text


def test_what_is_wrong_between_fields_does_not_show_the_request() -> None:
    wrong: dict[str, Any] = {"best_of": 2, "stream_options": {}, "allowed_token_ids": [-1]}
    for name, value in wrong.items():
        found = complete(prompt="a secret", **{name: value})
        assert isinstance(found, ApiError)
        assert "secret" not in found.message


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({}, ""), ({"response_format": {"type": "text"}}, ""),
        ({"response_format": {"type": "json_object"}}, grammar.json_object()),
        ({"response_format": {"type": "json_schema", "json_schema":
          {"name": "a", "schema": SCHEMA, "strict": True}}}, grammar.json_schema(SCHEMA)),
        ({"guided_json": SCHEMA}, grammar.json_schema(SCHEMA)),
        ({"guided_regex": "a+"}, grammar.regex("a+")),
        ({"structured_outputs": {"json": SCHEMA}}, grammar.json_schema(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, grammar.json_schema(SCHEMA)),
        ({"structured_outputs": {"choice": ["a", "b"]}}, grammar.choice(["a", "b"])),
        ({"structured_outputs": {"grammar": "start: A"}}, grammar.written("start: A")),
        ({"structured_outputs": {"json_object": True}}, grammar.json_object()),
        ({"structured_outputs": {"json_object": False, "regex": "a"}}, grammar.regex("a")),
        ({"guided_json": json.dumps(SCHEMA)}, grammar.json_schema(SCHEMA)),
        ({"guided_choice": ["a", "b"]}, grammar.choice(["a", "b"])),
        ({"guided_grammar": "start: A"}, grammar.written("start: A")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, grammar.json_schema(SCHEMA)),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, grammar.json_schema(SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, grammar.regex("a+")),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, grammar.regex("a+")),
    ],
)  # fmt: skip
def test_every_way_to_ask_for_a_grammar(fields: dict[str, Any], written: str) -> None:
    assert good(complete(**fields)).grammar == written
    assert good(chat(**fields)).grammar == written


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", None),
        ({"response_format": {"type": "json_schema"}}, "response_format", None),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json", None),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", None),
        ({"structured_outputs": {}}, "structured_outputs", None),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", None),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", None),
        ({"structured_outputs": {"json": {}, "choice": ["a"]}}, "structured_outputs", None),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "unsupported"),
        ({"guided_choice": ["a"], "guided_grammar": "x"}, "guided_choice", None),
        ({"guided_choice": []}, "guided_choice", None), ({"guided_choice": [1]}, "guided_choice", None),
        ({"guided_choice": ["a", ""]}, "guided_choice", "invalid_grammar"),
        ({"guided_json": "{"}, "guided_json", "invalid_grammar"),
        ({"guided_json": "3"}, "guided_json", "invalid_grammar"),
        ({"guided_json": " " * 10**5 + "{}"}, "guided_json", "invalid_grammar"),
        ({"guided_json": {"not": {"type": "null"}}}, "guided_json", "invalid_grammar"),
        ({"guided_grammar": "a" * 10**5}, "guided_grammar", "invalid_grammar"),
        ({"guided_regex": "\ud800"}, "guided_regex", "invalid_grammar"),
        ({"guided_regex": "a" * 10**5}, "guided_regex", "invalid_grammar"),
        ({"guided_json": {"enum": ["a" * 10**5]}}, "guided_json", "invalid_grammar"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be(fields: dict[str, Any], param: str, code: str | None) -> None:
    refused(complete(**fields), param, code)


# ---- anything at all --------------------------------------------------------------------------------

FIELDS = sorted(
    CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys() | {"tokens"}
)
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([2**31, 2**63, -1, 1])
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["user", "text", "json_object", "json_schema", "auto", "1"])
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "json_schema", "schema", "json", "regex", "1"]
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize(
    "kind", [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest]
)
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=5), st.booleans())
def test_any_object_is_answered_or_refused(
    kind: type[BaseModel], asked: dict[str, Any], whole: bool
) -> None:
    answer(kind, json.dumps((COMPLETION | CHAT if whole else {}) | asked))


@pytest.mark.parametrize("raw", ["[]", "null", '"x"', "1", "true", "NaN"])
def test_what_is_no_object_is_refused(raw: str) -> None:
    refused(answer(CompletionRequest, raw), None)


def errors(kind: type[BaseModel], asked: dict[str, Any]) -> int:
    """How many pydantic finds. Each costs microseconds on the loop that everybody waits for."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate(asked)
    return found.value.error_count()


MANY = 5000


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}), (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": [[-1] * MANY]}),
        (CompletionRequest, {"prompt": ["a", *[1] * MANY]}),
        (CompletionRequest, COMPLETION | {"stop": [1] * MANY}),
        (CompletionRequest, COMPLETION | {"stop_token_ids": [1] * MANY}),
        (CompletionRequest, COMPLETION | {"logit_bias": {str(i): [] for i in range(MANY)}}),
        (ChatRequest, CHAT | {"tools": [1] * MANY}),
        (ChatRequest, {"messages": [1] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "tool_calls": [1] * MANY}]}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
    ],
)  # fmt: skip
def test_many_wrong_items_are_few_errors(kind: type[BaseModel], asked: dict[str, Any]) -> None:
    assert errors(kind, asked) <= 5


def test_a_string_without_an_end_is_one_string() -> None:
    """Not a new one at each of its quotes: 64 KB took 7.6 s so, and 4 MiB would have taken hours."""
    data = b'"' + b'\\"' * 20_000
    JsonScan(JsonLimits(elements=0, keys=0, containers=0)).feed(data)


def test_a_part_that_is_no_text_is_named() -> None:
    found = chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    assert "content.str" not in refused(found, "messages")


def test_a_user_says_something() -> None:
    refused(chat(messages=[{"role": "user"}]), "messages")


def test_a_conversation_has_no_echo() -> None:
    refused(chat(echo=True), "echo")


# ---- the API's description ---------------------------------------------------------------------------


def described() -> dict[str, Any]:
    """The fields of a completion in /openapi.json."""
    app = FastAPI()

    @app.post("/c")
    def completions(asked: CompletionRequest) -> None: ...

    found = app.openapi()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert isinstance(found, dict)
    return found


def test_the_ways_to_write_prompts_stand_in_the_description() -> None:
    fields = described()
    ways = fields["prompt"]["oneOf"]
    assert [way["type"] for way in ways] == ["string", "array", "array", "array"]
    assert ways[1]["items"] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}
    assert fields["stop"]["anyOf"][0]["oneOf"][1]["maxItems"] == 4
    assert fields["logit_bias"]["anyOf"][0]["maxProperties"] == 1024


@pytest.mark.parametrize("name", ["n", "temperature", "top_p", "top_k", "seed", "logprobs"])
def test_the_ranges_stand_in_the_description(name: str) -> None:
    number = described()[name]["anyOf"][0]
    assert number.keys() & {"minimum", "exclusiveMinimum"}
    assert number.keys() & {"maximum", "exclusiveMaximum"}
