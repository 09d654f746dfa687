"""The grammar of tool calls: whatever a model draws, what comes out reads as text and valid calls."""

import json
import random
import tempfile
from dataclasses import replace
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
from baton.grammar import Grammars, GrammarSpec, Matcher, tool_calls
from baton.params import GenerationParams
from baton.server.tools_answer import ToolReading, WholeAnswer, whole_answer
from baton.text import TextStream, Tokenizer
from baton.tool_calls import (
    FORMATS,
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    CallFormat,
    Calls,
    Listing,
    SpecialTokens,
    Tool,
    bare,
    calls_text,
    format_of,
)
from tests.pure.test_grammar import END, FILE

CITY = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"], "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}  # fmt: skip
NONE: dict[str, Any] = {"type": "object", "properties": {}}
TOOLS = (Tool("weather", CITY), Tool('get "time"', NONE))
PLAIN = [each for each in FORMATS.values() if each.marked is None and not each.channels]
"""The others are in test_tool_calls_marked.py and test_tool_calls_channels.py."""
SCHEMAS = {each.name: each.schema for each in TOOLS}
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)  # as Qwen has them: added, not special
SPECIAL = ("[TOOL_CALLS]", "<|python_tag|>", "<|other|>")


@cache
def with_marks() -> Path:
    """A tokenizer that has all marks as tokens."""
    found = FastTokenizer.from_file(str(FILE))
    found.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    found.add_tokens([AddedToken(each, special=False) for each in TAGS])
    file = Path(tempfile.mkdtemp(prefix="marks-")) / "tokenizer.json"
    found.save(str(file))
    return file


@cache
def model(marks: bool) -> tuple[Grammars, Tokenizer, int]:
    """With or without the marks among its tokens, and the size of its vocabulary."""
    file = with_marks() if marks else FILE
    size = FastTokenizer.from_file(str(file)).get_vocab_size()
    return Grammars(file, size, [END]), Tokenizer(file), size


def allowed(guide: Matcher, size: int) -> list[int]:
    bits = bin(int.from_bytes(guide.mask(), "little"))[:1:-1]
    return [each for each, bit in enumerate(bits[:size]) if bit == "1"]


def shown(ids: list[int], tokenizer: Tokenizer, form: CallFormat) -> str:
    """The text, as a user's reader gets it."""
    marks = tuple(i for i in sorted(tokenizer.special_ids) if tokenizer.token(i) in form.marks)
    text = TextStream(tokenizer, (END,), GenerationParams(500, shown_special=marks))
    return text.push([each for each in ids if each != END]) + text.finish()


def read(ids: list[int], tokenizer: Tokenizer, calls: Calls, ended: bool) -> WholeAnswer:
    reading = ToolReading(calls.format, tuple(each.name for each in calls.tools), calls.forced)
    text = shown(ids, tokenizer, calls.format)
    return whole_answer(text, "stop" if ended else "length", calls.thinking, reading)


# What a model of each kind likes to say, so that walks come to calls.
LIKES = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>", '{"name": "', "weather",
         '", "arguments": ', '", "parameters": ', "[", "]", "}", ";", ",", " ", '"', "Rome", "a",
         "\n"]  # fmt: skip


@cache
def liked_ids(marks: bool) -> frozenset[int]:
    _, tokenizer, _ = model(marks)
    return frozenset(each for text in LIKES for each in tokenizer.encode(text, special=False))


@settings(max_examples=80, deadline=None, phases=[Phase.generate])  # to shrink a walk takes minutes
@given(
    st.sampled_from(PLAIN), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([None, True, False]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_what_is_drawn_reads_as_text_and_calls_that_fit_their_schemas(
    form: CallFormat, marks: bool, forced: bool, several: bool, thinking: bool | None,
    draw: random.Random,
) -> None:  # fmt: skip
    calls = Calls(form, TOOLS, forced, several, thinking)
    grammars, tokenizer, size = model(marks)
    likes = liked_ids(marks)
    guide, ids = grammars.open(tool_calls(calls)), list[int]()
    while len(ids) < 70 and not guide.finished:
        may = allowed(guide, size)
        liked = sorted(likes.intersection(may))
        ids.append(draw.choice(liked if liked and draw.random() < 0.8 else may))
        assert guide.accept(ids[-1])
    ended = guide.finished
    found = read(ids, tokenizer, calls, ended)
    for index, call in enumerate(found.calls):
        if ended or index < len(found.calls) - 1:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert several or len(found.calls) < 2
    if forced:
        assert not found.content
        assert not ended or found.calls
    if ended:
        assert found.finish_reason == ("tool_calls" if found.calls else "stop")


def call(name: str, arguments: str, form: CallFormat) -> str:
    return f'{{"name": {json.dumps(name)}, "{form.arguments}": {arguments}}}'


def around(text: str, form: CallFormat) -> str:
    """One call, as its model writes it."""
    inside = f"[{text}]" if form.listing is Listing.ALWAYS else text
    return f"{form.opens} {inside} {form.closes}".strip()


def goes(grammars: Grammars, tokenizer: Tokenizer, calls: Calls, text: str) -> tuple[bool, bool]:
    """Whether the answer may begin with the text, and whether it may end there."""
    guide = grammars.open(tool_calls(calls))
    if not all(guide.accept(each) for each in tokenizer.encode(text, special=False)):
        return False, False
    return True, guide.finished or END in allowed(guide, 1)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("form", PLAIN)
def test_free_text_is_free_until_a_call_begins(form: CallFormat, marks: bool) -> None:
    grammars, tokenizer, _ = model(marks)
    calls = Calls(form, TOOLS)
    good, bad = call("weather", '{"city": "Oslo"}', form), call("weather", '{"city": "Bonn"}', form)
    lead = "I will look. " if form.opens else ""
    for text, may in (
        ("Hello, Rome!\n", (True, True)), ("", (True, True)), ("Use <tool_cal or [TOOL", (True, True)),
        ('{"name": "Bob", "age": 3}', (True, True)), ('{"a": [1, "b', (True, True)),
        (lead + around(good, form), (True, True)), (lead + around(bad, form), (False, False)),
        (lead + around(call("rain", "{}", form), form), (not form.opens, not form.opens)),
        (lead + around(good, form)[:-4], (True, False)),
        (f"<|other|>Hi <|other|> {lead}", (True, True)),
    ):  # fmt: skip
        assert goes(grammars, tokenizer, calls, text) == may, text
    forced = replace(calls, forced=True)
    assert goes(grammars, tokenizer, forced, "Hello") == (False, False)
    assert goes(grammars, tokenizer, forced, around(good, form)) == (True, True)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("form", PLAIN)
def test_reasoning_is_free_and_what_follows_is_not(form: CallFormat, marks: bool) -> None:
    """A mark within it is none."""
    grammars, tokenizer, _ = model(marks)
    good = around(call("weather", '{"city": "Oslo"}', form), form)
    bad = good.replace("Oslo", "Bonn")
    for forced in (True, False):
        may = Calls(form, TOOLS, forced, thinking=False)
        for begin, calls in (("<think>", may), ("", replace(may, thinking=True))):
            thought = f"{begin}I could say {bad} here </think>\n\n"
            assert goes(grammars, tokenizer, calls, thought + good) == (True, True)
            assert not goes(grammars, tokenizer, calls, thought + bad)[0]
            assert goes(grammars, tokenizer, calls, f"{begin}hm") == (True, not forced)
        assert goes(grammars, tokenizer, may, good) == (True, True)


def test_parallel_calls_go_where_they_may() -> None:
    grammars, tokenizer, _ = model(True)
    for form in PLAIN:
        one = call("weather", '{"city": "Oslo"}', form)
        pair = {HERMES: f"{around(one, form)}\n{around(one, form)}", LLAMA3: f"{one}; {one}",
                MISTRAL: f"[TOOL_CALLS] [{one}, {one}]", JSON: f"[{one}, {one}]"}[form]  # fmt: skip
        for forced in (True, False):
            both = Calls(form, TOOLS, forced)
            assert goes(grammars, tokenizer, both, pair) == (True, True)
            assert not goes(grammars, tokenizer, replace(both, several=False), pair)[0]
            if form.listing is not Listing.NEVER and not forced:
                alone = calls_text(form, [one, one]).replace(f", {one}", "")  # a list of one
                assert goes(grammars, tokenizer, replace(both, several=False), alone) == (
                    True,
                    True,
                )


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("form", PLAIN)
def test_an_answer_that_calls_nothing_may_have_a_schema(form: CallFormat, marks: bool) -> None:
    grammars, tokenizer, _ = model(marks)
    calls = Calls(form, TOOLS, answer={"type": "object", "properties": {"x": {"type": "null"}}})
    good = around(call("weather", '{"city": "Oslo"}', form), form)
    for text, may in (
        ('{"x": null}', (True, True)), (good, (True, True)), ("Hi", (False, False)),
        (good.replace("Oslo", "Bonn"), (False, False)), ('{"y": 1}', (False, False)),
    ):  # fmt: skip
        assert goes(grammars, tokenizer, calls, text) == may, text


def test_another_worker_goes_on_within_a_call() -> None:
    """The state is a function of the grammar and the ids so far."""
    grammars, tokenizer, size = model(True)
    spec = tool_calls(Calls(HERMES, TOOLS))
    ids = tokenizer.encode("Ok <tool_call>\n" + call("weather", '{"city": "Oslo"}', HERMES))
    guide = grammars.open(spec)
    for at, each in enumerate(ids):
        assert allowed(grammars.open(spec, ids[:at]), size) == allowed(guide, size)
        assert guide.accept(each)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array"}, "object"), ({"type": "object", "not": {}}, "not"),
        ({"type": "object", "properties": {"a": {"uniqueItems": True}}}, "uniqueItems"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_named(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        tool_calls(Calls(HERMES, (Tool("f", schema),)))


def test_schemas_that_grow_without_bound_are_refused() -> None:
    """Closing objects repeats the names of what they refer to."""
    inner = {f"name_{index}": {"type": "null"} for index in range(300)}
    part = {"$defs": {"a": {"properties": inner}}, "properties": {
        str(index): {"$ref": "#/$defs/a", "properties": {"b": {}}} for index in range(60)}}  # fmt: skip
    tools = tuple(Tool(str(index), part) for index in range(3))
    with pytest.raises(RequestError, match="are the limit: offer fewer tools"):
        tool_calls(Calls(HERMES, tools))


def test_patterns_of_several_tools_add_up() -> None:
    """As in one schema, they take time with the square, or memory."""
    keyed = {"type": "object", "patternProperties": {f"^{index}": {} for index in range(60)}}
    tools = (Tool("a", keyed), Tool("b", keyed))
    assert tool_calls(Calls(HERMES, tools[:1]))
    with pytest.raises(RequestError, match="120 patternProperties are too many"):
        tool_calls(Calls(HERMES, tools))


@pytest.mark.parametrize("text", ["{}", '{"format":"hermes"}', '{"format":"x","tools":[["a",{}]]}'])
def test_other_fields_are_no_calls(text: str) -> None:
    with pytest.raises(RequestError, match="no tool calls"):
        GrammarSpec.parse(json.dumps({"kind": "tool_calls"} | json.loads(text)))


def test_remarks_are_left_out_of_schemas_and_names_are_none() -> None:
    inner = {"type": "string", "description": "d", "title": "t", "examples": ["a"], "default": "b"}
    schema = {
        "description": "all", "properties": {"description": inner, "items": {"items": inner}},
        "anyOf": [inner, True], "enum": [{"title": "kept"}],
    }  # fmt: skip
    assert bare(schema) == {
        "properties": {"description": {"type": "string"}, "items": {"items": {"type": "string"}}},
        "anyOf": [{"type": "string"}, True], "enum": [{"title": "kept"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "form"),
    [
        # Qwen 2.5 and 3, Hermes 3
        ('{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and '
         'arguments within <tool_call></tool_call> tags:\\n<tool_call>\\n{\\"name\\": <function-name>, '
         '\\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}', HERMES),
        # Qwen3-Coder and GLM 4.5: other calls within the same tags
        ("{{- '\\n<tool_call>\\n<function=example_function_name>\\n<parameter=example_1>' }}",
         FORMATS["qwen3_coder"]),
        ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>", FORMATS["glm45"]),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments",
         FORMATS["deepseek_v31"]),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '```json'",
         FORMATS["deepseek_v3"]),
        ("{{ '<｜DSML｜function_calls>' }}{{ '<｜DSML｜invoke name=' }}", FORMATS["deepseek_v32"]),
        ("<|tool_calls_section_begin|>{{ id }}<|tool_call_argument_begin|>", FORMATS["kimi_k2"]),
        ("{%- set toolcall_begin_token = '<minimax:tool_call>' -%}", FORMATS["minimax_m2"]),
        ("{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", FORMATS["mistral_v13"]),
        # Mistral 7B v0.3, Nemo
        ('{{- "[AVAILABLE_TOOLS] [" }}{{- "[TOOL_CALLS] [" }}', MISTRAL),
        # Llama 3.1 and 3.2
        ('{{- "<|start_header_id|>ipython<|end_header_id|>" }}{{- "<|python_tag|>" + call }}', LLAMA3),
        ("{{- '<|start_header_id|>assistant<|end_header_id|>' }}{{- '\"parameters\": ' }}", LLAMA3),
        # SmolLM2, Llama 3 without tools
        ("{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}", JSON),
        ("{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>' %}", JSON),
    ],
)  # fmt: skip
def test_a_template_says_how_its_model_calls(template: str, form: CallFormat) -> None:
    assert format_of(template) is form


def test_special_tokens_in_a_row_are_one_range() -> None:
    """Some models have thousands."""
    special = SpecialTokens([9, 3, 4, 5, 7, 8], {"a": 4})
    assert special.any_but() == "<[3-5,7-9]>"
    assert special.any_but("a", "b") == "<[3-3,5-5,7-9]>"
    assert (special.named("a"), special.named("b"), SpecialTokens().any_but()) == ("<[4]>", "", "")


def test_what_agents_send_as_schemas_is_taken() -> None:
    """As zod, pydantic and MCP servers write them."""
    grammars, tokenizer, _ = model(True)
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
        "properties": {
            "url": {"type": "string", "format": "uri", "default": "x"},
            "path": {"format": "path", "type": "string"},
            "meta": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
            "n": {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}], "title": "N"},
        },
        "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    calls = Calls(HERMES, (Tool("f", schema), Tool("any", {}), *TOOLS))
    for name, arguments, may in (
        ("f", '{"meta": {"a": [1]}, "n": null}', True), ("f", '{"n": 0}', False),
        ("any", '{"x": {"y": []}}', True), ("any", "[]", False),
    ):  # fmt: skip
        text = around(call(name, arguments, HERMES), HERMES)
        assert goes(grammars, tokenizer, calls, text)[0] is may
