"""A client's schema, closed: what it costs, what is malformed, and the names of its copies."""

import contextlib
import json
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import RequestError
from baton.grammar import Grammars, json_schema
from baton.json_schema import enforceable
from baton.server.api_error import ApiError
from baton.server.schema import CompletionRequest
from baton.text import Tokenizer
from tests.pure.test_grammar import END, FILE, VOCABULARY

MUCH: dict[str, Any] = {f"p{i}": {} for i in range(2300)}
REPEATING = {"properties": MUCH | {f"r{i}": {"$ref": "#", "properties": {}} for i in range(1100)}}
SPELLED = {
    "anyOf": [{"properties": {f"p{i}": {} for i in range(2000)}}, {}],
    "properties": {
        f"r{i}": {"$ref": "#/anyOf/" + "0" * (i + 1), "properties": {}} for i in range(200)
    },
}
NESTED: dict[str, Any] = {"properties": {f"p{i}": {} for i in range(3000)}}
for _ in range(8):
    NESTED = {"properties": {"a": NESTED}}
LONG: dict[str, Any] = {
    "properties": {"n" * 1000 + str(i): {} for i in range(30)}
    | {f"r{i}": {"$ref": "#", "properties": {}} for i in range(900)}
}
SAID = {
    "properties": MUCH
    | {f"r{i}": {"$ref": "#", "properties": {}, "additionalProperties": False} for i in range(600)}
}


@pytest.mark.parametrize(
    "schema", [REPEATING, SPELLED, LONG, SAID], ids=["ref", "00", "long", "said"]
)
def test_what_multiplies_is_refused(schema: Mapping[str, Any]) -> None:
    before = time.process_time()
    with pytest.raises(RequestError, match="more than 50,000 parts, the limit") as caught:
        json_schema(schema)
    assert time.process_time() - before < 2
    assert caught.value.code == "invalid_grammar"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {} for i in range(4000)}},
        NESTED,
        {"allOf": [{"properties": {f"p{i}": {} for i in range(2000)}}, {"required": ["a"]}]},
    ],
    ids=["wide", "nested", "allOf"],
)
def test_what_is_only_large_is_served(schema: Mapping[str, Any]) -> None:
    assert len(json.dumps(enforceable(schema))) < 20 * len(json.dumps(schema))


def test_one_copy_for_all_spellings_of_a_reference() -> None:
    part = {"properties": {"a": {"type": "null"}}}
    spellings = ["#/anyOf/1", "#/anyOf/01", "#/anyOf/0000000000000001"]
    inner = [{"$ref": each, "properties": {"b": {}}} for each in spellings]
    found = enforceable({"anyOf": [{"items": inner}, part]})
    assert [*found["$defs"].values()] == [part]
    assert {each["$ref"] for each in found["anyOf"][0]["items"]} == {"#/$defs/open:0"}


def test_spellings_of_a_key_are_one() -> None:
    schema = {
        "$defs": {"a/b~": {"properties": {"x": {}}}},
        "properties": {"p": {"$ref": "#/$defs/a~1b~0", "properties": {"y": {}}}},
    }
    found = enforceable(schema)
    assert {*found["properties"]["p"]["properties"]} == {"x", "y"}
    assert found["$defs"]["open:0"] == {"properties": {"x": {}}}


def test_definitions_of_the_clients_own_are_not_overwritten() -> None:
    own = {"open:0": {"type": "integer"}, "open:1": {"type": "null"}}
    schema = {
        "$defs": own | {"base": {"properties": {"a": {}}}},
        "properties": {
            "n": {"$ref": "#/$defs/open:0"},
            "o": {"$ref": "#/$defs/base", "properties": {"b": {}}},
            "p": {"$ref": "#/$defs/open%3A2"},
        },
    }
    found = enforceable(schema)
    assert found["$defs"].items() >= own.items()
    assert found["properties"]["o"]["$ref"] == "#/$defs/open:3"
    assert found["$defs"]["open:3"] == {"properties": {"a": {}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"properties": None, "patternProperties": {"^a": {}}}, "properties must be an object, got null"),
        ({"properties": []}, r"/properties must be an object, got \[\]"),
        (
            {"$defs": [], "properties": {"a": {"$ref": "#", "properties": {}}}},
            r"/\$defs must be an object, got \[\]",
        ),
        ({"items": {"patternProperties": 3}}, "/items/patternProperties must be an object, got 3"),
        ({"properties": {"a": {"allOf": {}}}}, "/properties/a/allOf must be a list, got {}"),
        ({"anyOf": None}, "/anyOf must be a list, got null"),
        ({"additionalProperties": []}, r"/additionalProperties must be a schema, got \[\]"),
        ({"items": "x"}, '/items must be a schema or a list, got "x"'),
    ],
)  # fmt: skip
def test_the_malformed_is_named(schema: Mapping[str, Any], text: str) -> None:
    request = CompletionRequest.model_validate({"prompt": "x", "guided_json": schema})
    with pytest.raises(ApiError, match=text) as caught:
        request.grammar_field()
    found = caught.value
    assert (found.status, found.param, found.code) == (400, "guided_json", "invalid_grammar")


KEYS = st.sampled_from(
    ["properties", "patternProperties", "$defs", "definitions", "allOf", "anyOf", "oneOf", "items",
     "prefixItems", "additionalProperties", "required", "$ref", "format", "type", "0", "a", "open:0"]
)  # fmt: skip
REFERENCES = st.lists(KEYS, max_size=3).map(lambda steps: "#" + "".join(f"/{s}" for s in steps))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | KEYS | REFERENCES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, ANYTHING, max_size=5))
def test_anything_is_rewritten_or_refused(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    with contextlib.suppress(RequestError):
        json.dumps(enforceable(schema))
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    ("fields", "long"),
    [
        ({}, False),
        ({"guided_regex": "a"}, False),
        ({"guided_choice": ["a", "b"]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"structured_outputs": {"json_object": True}}, False),
        ({"guided_regex": "a" * 4097}, True),
        ({"guided_grammar": "[" * 16_384}, True),
        ({"guided_choice": ["a" * 1000] * 5}, True),
        ({"structured_outputs": {"grammar": "[" * 16_384}}, True),
        ({"structured_outputs": {"json": {"type": "object"}}}, True),
        ({"guided_json": {"type": "object"}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, True),
        ({"response_format": {"type": "json_schema", "schema": {}}}, True),
    ],
)
def test_which_grammars_are_read_in_a_thread(fields: dict[str, Any], long: bool) -> None:
    assert CompletionRequest.model_validate({"prompt": "x"} | fields).has_long_grammar is long


@cache
def grammars() -> Grammars:
    return Grammars(FILE, VOCABULARY, (END,))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(FILE)


def follows(schema: Mapping[str, Any], value: Any) -> bool:
    """Is this the beginning of a text that the schema's grammar allows?"""
    guide = grammars().open(json_schema(schema))
    text = json.dumps(value, separators=(",", ":"))
    return all(guide.accept(each) for each in tokenizer().encode(text, special=False))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("a b", "a%20b"), ("a b", "a b"), ("a%b", "a%25b"), ("a%b", "a%b"), ("a%20b", "a%2520b"),
        ("a%20b", "a%20b"), ("é", "é"), ("é", "%C3%A9"), ("a/b", "a~1b"), ("a/b", "a%2Fb"),
        ("a/b", "a%7E1b"), ("a~b", "a~0b"), ("a~b", "a%7e0b"), ("a#b", "a#b"), ("a#b", "a%23b"),
        ("List[int]", "List[int]"), ("List[int]", "List%5Bint%5D"), ("a<b>", "a<b>"), ("a|b", "a|b"),
        ('a"b', 'a"b'), ("a\\b", "a%5Cb"), ("a+b", "a+b"), ("a?b", "a?b"), ("", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [{}, {"properties": {"own": {}}}], ids=["alone", "opened"])
def test_a_reference_means_the_definition_of_that_name(
    name: str, reference: str, beside: dict[str, Any]
) -> None:
    """In every spelling, and the grammar holds what stands there."""
    inner = {"type": "object", "properties": {"q": {"const": 7}}, "required": ["q"]}
    schema = {
        "properties": {"x": {"$ref": f"#/$defs/{reference}", **beside}}, "required": ["x"],
        "$defs": {name: inner, "other": {"const": 8}},
    }  # fmt: skip
    assert follows(schema, {"x": {"q": 7}})
    assert not follows(schema, {"x": {"q": 8}})
    assert not follows(schema, {"x": 8})


def test_a_name_as_it_is_gives_way_to_the_decoded_one() -> None:
    both = {"a%20b": {"const": 1}, "a b": {"const": 2}}
    for reference, meant in (("$defs/a%20b", 2), ("$defs/a%2520b", 1), ("%24defs/a%20b", 2)):
        schema = {"$ref": f"#/{reference}", "$defs": both}
        assert [each for each in (1, 2) if follows(schema, each)] == [meant]


@pytest.mark.parametrize(
    "reference", ["#/$defs/none", "#none", "#/$defs/a%2", "other.json", "#/$defs/a%FF"]
)
def test_a_reference_to_nothing_is_refused(reference: str) -> None:
    with pytest.raises(RequestError, match="cannot be compiled"):
        grammars().check(json_schema({"$ref": reference, "$defs": {"a": {}}}))
