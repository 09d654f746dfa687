"""Calls whose name stands outside of JSON: the grammar, and the reader wherever the text is cut."""

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from baton.errors import RequestError
from baton.grammar import GAP, NO_TOKENS, Grammars, tool_calls
from baton.server.templates import ChatTemplate, CompiledTemplate
from baton.server.tools_answer import ToolReading
from baton.server.tools_ids import numbered
from baton.server.tools_marked import reader_of
from baton.server.tools_reader import Call
from baton.server.turns import Conversation
from baton.text import Tokenizer
from baton.tool_calls import (
    FORMATS,
    CallFormat,
    Calls,
    Tool,
    call_text,
    calls_text,
    format_of,
    rules_of,
)
from baton.tool_calls_marked import MOST_COPIED, Kind, parameter_of, parameters_of
from tests.pure.cuts import check_cuts
from tests.pure.heard import Answer, heard
from tests.pure.test_grammar import FILE
from tests.pure.test_tool_calls import END, allowed, goes, model, shown

MARKED = [each for each in FORMATS.values() if each.marked is not None]
BY_PARAMETER = [each for each in MARKED if each.marked and each.marked.parameter]
GUESSED = [each for each in BY_PARAMETER if each.marked and not each.marked.parameter.keyed_json]
"""The model does not say whether a value is a text: what reads as JSON is JSON."""
CITY: dict[str, Any] = {
    "type": "object", "additionalProperties": False,
    "properties": {
        "city": {"$ref": "#/$defs/city"}, "note": {"type": "string"}, "days": {"type": "integer"},
        "where": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/city"}},
    },
    "required": ["city"], "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}  # fmt: skip
FREE: dict[str, Any] = {"type": "object", "additionalProperties": True}
NONE: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = (Tool("weather", CITY), Tool("get_time.now", NONE), Tool("any", FREE))
SCHEMAS = {each.name: each.schema for each in TOOLS}
ROME = '{"city": "Rome"}'
LONG = json.dumps({
    "city": "Oslo", "note": 'a "b"\n</param <arg_ü>', "days": 3, "where": None, "tags": ["Rome"],
}, ensure_ascii=False)  # fmt: skip


@cache
def reading(form: CallFormat, forced: bool = False) -> ToolReading:
    parameters = {each.name: parameters_of(each.name, each.schema) for each in TOOLS}
    return ToolReading(form, tuple(SCHEMAS), forced, parameters)


def written(form: CallFormat, *calls: tuple[str, str]) -> str:
    return calls_text(form, [call_text(form, *call, i) for i, call in enumerate(calls)])


def as_values(answer: Answer) -> list[tuple[str, Any]]:
    return [(each.name, json.loads(each.arguments)) for each in answer.calls]


@pytest.mark.parametrize("form", MARKED)
def test_what_is_written_reads_the_same_and_the_grammar_takes_it(form: CallFormat) -> None:
    grammars, tokenizer, _ = model(False)
    for calls in (
        [("weather", ROME)], [("weather", LONG), ("get_time.now", "{}"), ("weather", ROME)],
        [("any", '{"x": {"y": [1, "</a>"]}, "z": "1"}')], [("any", "{}")],
    ):  # fmt: skip
        text = written(form, *calls)
        found = heard(text, reading(form))
        given = [(name, json.loads(arguments)) for name, arguments in calls]
        if form in GUESSED and calls[0][0] == "any" and given[0][1]:
            given = [("any", {"x": {"y": [1, "</a>"]}, "z": 1})]  # a text that reads as JSON
        assert (found.content, as_values(found), found.complete) == ("", given, True)
        said = f"I look.\n{text}"
        assert heard(said, reading(form)).content == "I look."
        for forced, lead in ((True, ""), (False, ""), (False, "I look.\n")):
            spec = Calls(form, TOOLS, forced)
            assert goes(grammars, tokenizer, spec, lead + text) == (True, True), lead + text


@pytest.mark.parametrize("form", MARKED)
def test_behind_the_mark_nothing_else_goes(form: CallFormat) -> None:
    grammars, tokenizer, _ = model(False)
    calls = Calls(form, TOOLS)
    for text, may in (
        ("Hello!", True), (written(form, ("weather", '{"city": "Bonn"}')), False),
        (written(form, ("rain", "{}")), False), (written(form, ("weather", "{}")), False),
        (written(form, ("get_time.now", '{"a": 1}')), False),
        (written(form, ("weather", '{"city": "Rome", "days": "x"}')), False),
    ):  # fmt: skip
        assert goes(grammars, tokenizer, calls, text)[0] is may, text
    pair = written(form, ("weather", ROME), ("weather", ROME))
    assert not goes(grammars, tokenizer, Calls(form, TOOLS, several=False), pair)[0]
    assert not goes(grammars, tokenizer, Calls(form, TOOLS, forced=True), "Hello")[0]
    answer = Calls(form, TOOLS, answer={"type": "object", "properties": {"x": {"type": "null"}}})
    assert goes(grammars, tokenizer, answer, '{"x": null}') == (True, True)
    assert goes(grammars, tokenizer, answer, written(form, ("weather", ROME))) == (True, True)


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(st.sampled_from(MARKED), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_what_is_drawn_reads_as_calls_that_fit_their_schemas(
    form: CallFormat, several: bool, forced: bool, draw: random.Random
) -> None:
    """Mostly what a model likes to say, so that walks come to the end of a call."""
    grammars, tokenizer, size = model(False)
    likes = tokenizer.encode(written(form, ("weather", LONG), ("any", '{"b": [1]}')), special=False)
    guide, ids = grammars.open(tool_calls(Calls(form, TOOLS, forced, several))), list[int]()
    at = 0
    while len(ids) < 130 and not guide.finished:
        may = allowed(guide, size)
        liked = [each for each in likes[at : at + 1] if each in may]
        if not liked and END in may and draw.random() < 0.5:
            break
        ids.append(liked[0] if liked and draw.random() < 0.95 else draw.choice(may))
        at = likes.index(ids[-1], at) + 1 if ids[-1] in likes[at:] else at
        assert guide.accept(ids[-1])
    ended = guide.finished or END in allowed(guide, 1)
    found = heard(shown(ids, tokenizer, form), reading(form, forced))
    for index, call in enumerate(found.calls):
        if ended or index < len(found.calls) - 1:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert several or len(found.calls) < 2
    assert not (forced and ended) or found.calls


PARTS = ["<tool_call>", "</tool_call>", "<function=", "weather", ">\n", "<parameter=", "city", "Rome",
         "\n</parameter>", "</function>", "[TOOL_CALLS]", "[ARGS]", "{", "}", '"', "a", "\n", " ", ":0",
         "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<｜tool▁calls▁begin｜>", "note",
         "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"]  # fmt: skip
THREE = ("weather", LONG), ("any", '{"b": [1]}'), ("weather", ROME)
WRITTEN = [f"Look: {written(form, *THREE)} Done." for form in MARKED]
TEXTS = st.one_of(
    st.sampled_from(WRITTEN),
    st.lists(st.sampled_from([*PARTS, *WRITTEN]), max_size=8).map("".join),
)


@given(st.sampled_from(MARKED), TEXTS, st.lists(st.integers(0, 600), max_size=20))
def test_wherever_it_is_cut(form: CallFormat, text: str, cuts: list[int]) -> None:
    known = reading(form)
    reader = reader_of(form, known.names, known.parameters)
    check_cuts(reader, heard(text, known), text, cuts)


@pytest.mark.parametrize("form", MARKED)
def test_arguments_come_while_they_are_written(form: CallFormat) -> None:
    known = reading(form)
    reader = reader_of(form, known.names, known.parameters)
    note = json.dumps({"city": "Oslo", "note": "word " * 50})
    text = written(form, ("weather", note))
    told = [len("".join(piece.arguments for piece in reader.take(each).calls)) for each in text]
    assert max(told) < 60


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, Kind.TEXT), ({"enum": ["a", "b"]}, Kind.TEXT), ({"const": "a"}, Kind.TEXT),
        ({"type": ["string", "null"]}, Kind.NULLABLE), ({}, Kind.ANY), (True, Kind.ANY),
        ({"anyOf": [{"$ref": "#/$defs/s"}, {"type": "null"}]}, Kind.NULLABLE),
        ({"type": "string", "pattern": "^a"}, Kind.JSON), ({"type": "string", "minLength": 2}, Kind.JSON),
        ({"enum": ["a", 1]}, Kind.JSON), ({"enum": ["a\nb"]}, Kind.JSON),
        ({"type": "integer"}, Kind.JSON),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, Kind.JSON),
        ({"$ref": "#/$defs/s"}, Kind.TEXT), ({"enum": ["null"]}, Kind.TEXT),
        ({"anyOf": [{"enum": ["null"]}, {"type": "null"}]}, Kind.JSON),
    ],
)  # fmt: skip
def test_what_a_value_is_follows_from_its_schema(schema: Any, kind: Kind) -> None:
    assert parameter_of(schema, {"$defs": {"s": {"type": "string"}}}).kind is kind


@pytest.mark.parametrize("form", BY_PARAMETER)
@pytest.mark.parametrize(
    ("name", "schema", "word"),
    [
        ("f", {"anyOf": [{"properties": {"a": {}}}, {}]}, "anyOf"),
        ("f", {"properties": {"a>b": {}}}, "a>b"), ('get "time"', {}, "get"),
        ("f", {"properties": {"a": False}}, "parameter a"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_by_name(
    form: CallFormat, name: str, schema: Any, word: str
) -> None:
    with pytest.raises(RequestError, match=word):
        tool_calls(Calls(form, (Tool(name, schema),)))


CODER = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or () %}"
    "\n<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}{% endfor %}"
)


def test_a_template_renders_the_calls_of_before_and_they_read_the_same() -> None:
    form = format_of(CODER)
    assert form.name == "qwen3_coder"
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": LONG}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    text = CompiledTemplate(ChatTemplate(CODER, {})).render(Conversation(turns))
    found = heard(text.removeprefix("<assistant>"), reading(form))
    assert as_values(found) == [("weather", json.loads(LONG))]
    assert found.calls == (Call("weather", LONG),)


def test_calls_and_their_results_get_the_ids_that_a_model_gave_them() -> None:
    """Kimi K2 numbers the calls of a conversation, and its template shows their ids."""

    def called(id_: str, name: str) -> dict[str, Any]:
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}

    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [called("x", "a"), called("y", "b")]},
        {"role": "tool", "tool_call_id": "y", "content": "2"},
        {"role": "tool", "tool_call_id": "other", "content": "3"},
        {"role": "assistant", "tool_calls": [called("x", "a")]},
        {"role": "tool", "tool_call_id": "x", "content": "4"},
    ]
    found = numbered(turns)
    ids = [[each["id"] for each in turn.get("tool_calls", ())] for turn in found]
    assert ids == [[], ["functions.a:0", "functions.b:1"], [], [], ["functions.a:2"], []]
    results = [turn.get("tool_call_id") for turn in found]
    assert results == [None, None, "functions.b:1", "other", None, "functions.a:2"]
    assert found[0] == turns[0]


@pytest.mark.parametrize("form", BY_PARAMETER)
def test_what_would_be_copied_for_each_parameter_has_a_limit(form: CallFormat) -> None:
    """Each parameter that refers to a definition has its own copy of the tool's schema."""

    def tool(parameters: int) -> Tool:
        tags = {"type": "array", "items": {"$ref": "#/$defs/a"}}
        properties = {f"p{each}": tags for each in range(parameters)}
        definitions = {"a": {"enum": [str(each) for each in range(1000)]}}
        return Tool("f", {"type": "object", "properties": properties, "$defs": definitions})

    few = Calls(form, (tool(50),))
    tool_calls(few)
    assert len(rules_of(few, NO_TOKENS, GAP)) < 1.1 * MOST_COPIED
    with pytest.raises(RequestError, match="150 parameters of f refer to its definitions: offer"):
        tool_calls(Calls(form, (tool(150),)))


@pytest.mark.parametrize("form", BY_PARAMETER)
def test_what_is_copied_has_a_limit_over_all_tools(form: CallFormat) -> None:
    """Each alone is within it."""
    tags = {"type": "array", "items": {"$ref": "#/$defs/a"}}
    schema = {
        "type": "object", "properties": {f"p{each}": tags for each in range(20)},
        "$defs": {"a": {"enum": [str(each) for each in range(1000)]}},
    }  # fmt: skip
    tools = [Tool(f"f{each}", schema) for each in range(4)]
    tool_calls(Calls(form, tuple(tools[:2])))
    limit = f"characters, {MOST_COPIED:,} are the limit: offer fewer tools"
    with pytest.raises(RequestError, match=limit):
        tool_calls(Calls(form, tuple(tools)))


def test_a_model_that_says_what_a_value_is_is_believed() -> None:
    """DeepSeek V3.2 writes string="true" before a text and "false" before JSON."""
    form = FORMATS["deepseek_v32"]
    grammars, tokenizer, _ = model(False)
    calls = Calls(form, TOOLS)
    for arguments in ('{"x": "1"}', '{"x": 1}', '{"x": "null"}', '{"x": null}', '{"x": [1, "a"]}'):
        text = written(form, ("any", arguments))
        assert heard(text, reading(form)).calls == (Call("any", arguments),)
        assert goes(grammars, tokenizer, calls, text) == (True, True)
    for where in ('"null"', "null", '"a"'):
        arguments = f'{{"city": "Rome", "where": {where}}}'
        text = written(form, ("weather", arguments))
        assert heard(text, reading(form)).calls == (Call("weather", arguments),)
        assert goes(grammars, tokenizer, calls, text) == (True, True)
    text = written(form, ("weather", '{"city": "Rome", "note": "x"}'))
    said = text.replace('name="note" string="true"', 'name="note" string="false"')
    assert not goes(grammars, tokenizer, calls, said)[0]


@cache
def with_dsml(special: bool) -> tuple[Grammars, Tokenizer]:
    """A model that has the middle of all its marks as a token."""
    found = FastTokenizer.from_file(str(FILE))
    found.add_tokens([AddedToken("｜DSML｜", special=special)])
    file = Path(tempfile.mkdtemp(prefix="dsml-")) / "tokenizer.json"
    found.save(str(file))
    return Grammars(file, found.get_vocab_size(), [END]), Tokenizer(file)


@pytest.mark.parametrize("special", [False, True])
def test_marks_with_a_token_within_them(special: bool) -> None:
    form = FORMATS["deepseek_v32"]
    grammars, tokenizer = with_dsml(special)
    good, bad = written(form, ("weather", LONG)), written(form, ("weather", '{"city": "Bonn"}'))
    ids = tokenizer.encode(good, special=False)
    assert "｜DSML｜" in [tokenizer.token(each) for each in ids]
    assert heard(shown(ids, tokenizer, form), reading(form)).calls == (Call("weather", LONG),)
    for forced, lead in ((True, ""), (False, ""), (False, "a < b: ")):
        calls = Calls(form, TOOLS, forced)
        assert goes(grammars, tokenizer, calls, lead + good) == (True, True)
        assert not goes(grammars, tokenizer, calls, lead + bad)[0]
    assert goes(grammars, tokenizer, Calls(form, TOOLS), "Hello <b>") == (True, True)


def test_the_copies_of_a_schema_are_one_until_they_are_written() -> None:
    tags = {"type": "array", "items": {"$ref": "#/$defs/a"}}
    schema = {
        "type": "object", "properties": {"a": tags, "b": tags}, "additionalProperties": tags,
        "$defs": {"a": {"type": "integer"}},
    }  # fmt: skip
    found = parameters_of("f", schema)
    assert found.others is not None
    first, *others = (each.schema["$defs"] for each in (*found.known.values(), found.others))
    assert all(each["whole"] is first["whole"] for each in others)


@pytest.mark.parametrize("form", BY_PARAMETER)
@pytest.mark.parametrize(
    "more", [{}, {"additionalProperties": True}, {"additionalProperties": {"$ref": "#/$defs/a"}}]
)
def test_what_is_required_is_written_also_if_it_is_no_property(
    form: CallFormat, more: dict[str, Any]
) -> None:
    grammars, tokenizer, _ = model(False)
    definitions = {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}}, "b": {"type": "integer"}}
    schema = {"type": "object", "required": ["x"], "$defs": definitions} | more
    calls = Calls(form, (Tool("f", schema),), True)
    assert goes(grammars, tokenizer, calls, written(form, ("f", "{}"))) == (False, False)
    assert not goes(grammars, tokenizer, calls, written(form, ("f", '{"y": [1]}')))[0]
    for arguments in ('{"x": [1]}', '{"x": [1], "y": [2]}'):
        text = written(form, ("f", arguments))
        assert goes(grammars, tokenizer, calls, text) == (True, True), text
    with pytest.raises(RequestError, match="a>b"):
        tool_calls(Calls(form, (Tool("f", schema | {"required": ["a>b"]}),)))


def test_what_is_required_and_no_property_has_a_limit() -> None:
    more = {"enum": [str(each) for each in range(1000)]}
    required = [str(each) for each in range(100)]
    with pytest.raises(RequestError, match="100 parameters that f requires are none of its prop"):
        parameters_of("f", {"type": "object", "required": required, "additionalProperties": more})


@pytest.mark.parametrize("form", GUESSED)
@pytest.mark.parametrize("value", [r'"\ud800"', "1e5", r'{"a": "\ud800", "b": 1E+2}', "0.10"])
def test_a_value_that_reads_as_json_stays_as_it_is(form: CallFormat, value: str) -> None:
    text = written(form, ("any", '{"x": "VALUE"}')).replace("VALUE", value)
    (call,) = heard(text, reading(form)).calls
    assert call.arguments == f'{{"x": {value}}}'
    call.arguments.encode()
