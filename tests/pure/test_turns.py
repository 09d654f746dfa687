"""Messages as a template wants them: parts or a text, objects or JSON, a last one that goes on."""

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from baton.errors import RequestError
from baton.server.templates import ChatTemplate, CompiledTemplate
from baton.server.turns import MOST_ARGUMENTS, Conversation

PRINTS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}={{ m.content }}{% else %}"
    "{% for p in m.content %}+{{ p['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
VARIABLE = (
    "{% for m in messages %}{% set c = m.get('content', '') or '' %}<{{ m.role }}>"
    "{% for p in c if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
MACRO = (
    "{% macro show(c) %}{% if c is string %}={{ c }}{% else %}{% for p in c %}+{{ p.text }}{% endfor %}"
    "{% endif %}{% endmacro %}{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}"
)
PICKS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}{% endfor %}"
)
WORDS = (
    "{% for m in messages %}<{{ m.role }}>{% for w in m.content.split() %}{{ w }}.{% endfor %}"
    "{% endfor %}"
)
SENT = [
    {"role": "user", "content": "a"},
    {"role": "user", "content": [{"type": "text", "text": "b "}, {"type": "text", "text": "c"}]},
]  # fmt: skip


def shown(source: str, messages: list[Any], **more: Any) -> str:
    return CompiledTemplate(ChatTemplate(source, {})).render(Conversation(messages, **more))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (PRINTS, "<user>a<user>b c"), (PARTS, "<user>a<user>b c"), (EITHER, "<user>=a<user>+b +c"),
        (VARIABLE, "<user>a<user>b c"), (MACRO, "<user>=a<user>+b +c"), (PICKS, "<user>a<user>b c"),
        (WORDS, "<user>a.<user>b.c."),
    ],
)  # fmt: skip
def test_a_template_gets_the_contents_that_it_wants(source: str, text: str) -> None:
    assert shown(source, SENT) == text


def test_a_refusal_is_what_it_says_and_a_tool_may_say_nothing() -> None:
    refusal = [{"type": "refusal", "refusal": "no"}, {"type": "refusal", "refusal": None}]
    messages = [{"role": "assistant", "content": refusal}, {"role": "tool", "content": None}]
    for source in (PRINTS, PARTS):
        assert shown(source, messages) == "<assistant>no<tool>"


def calling(arguments: Any) -> list[Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


EACH = "{% for t in messages[0].tool_calls %}{% set f = t.function %}"
AS_JSON = EACH + "{{ f.arguments | tojson }}{% endfor %}"
AS_ITEMS = EACH + "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}"
AS_TEXT = EACH + "{{ f.name + f.arguments }}{% endfor %}"


def test_arguments_are_objects_unless_a_template_joins_them_to_a_text() -> None:
    sent = calling('{"a": "é", "b": [1]}')
    assert shown(AS_JSON, sent) == '{"a": "é", "b": [1]}'
    assert shown(AS_ITEMS, sent) == "a=é;b=[1];"
    assert shown(AS_TEXT, sent) == 'f{"a": "é", "b": [1]}'
    assert shown(AS_JSON, calling({"a": 1})) == '{"a": 1}'
    for nothing in ("", " ", None):
        assert shown(AS_JSON, calling(nothing)) == "{}"
    assert json.loads(shown(AS_JSON, calling("{broken"))) == "{broken"
    assert sent == calling('{"a": "é", "b": [1]}')


def test_arguments_are_bounded_though_they_are_json_within_json() -> None:
    with pytest.raises(RequestError, match="arguments of all tool_calls hold more than") as caught:
        shown(AS_JSON, calling("[" + "[],[]," * MOST_ARGUMENTS + "0]"))
    assert caught.value.param == "messages"
    assert shown(AS_JSON, calling('{"a":' * 5000)).startswith('"{')


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS = CHATML.replace("m.content", "(m.content | trim)")


@pytest.mark.parametrize("source", [CHATML, STRIPS, PARTS])
@pytest.mark.parametrize("text", ["The answer is", "The answer is ", "{", " x"])
def test_the_last_message_goes_on_as_in_transformers(source: str, text: str) -> None:
    def turns(content: Any) -> list[Any]:
        return [
            {"role": "user", "content": content("Hi")},
            {"role": "assistant", "content": content(text)},
        ]

    def same(each: str) -> Any:
        return [{"type": "text", "text": each}] if source == PARTS else each

    theirs, _ = render_jinja_template(
        conversations=[turns(same)], chat_template=source, continue_final_message=True
    )
    for way in (str, lambda each: [{"type": "text", "text": each}]):
        mine = shown(source, turns(way), add_generation_prompt=False, continue_final_message=True)
        assert mine == theirs[0]
        assert not mine.endswith("<|im_end|>\n")


def test_what_cannot_go_on_is_refused() -> None:
    with pytest.raises(RequestError, match="no text to go on with"):
        shown(PRINTS, calling("{}"), continue_final_message=True)
    with pytest.raises(RequestError, match="does not show the last message"):
        shown("x", SENT, continue_final_message=True)


def test_a_template_sees_variables_and_documents() -> None:
    source = "{{ enable_thinking is false }}{{ documents | tojson }}{{ bos_token }}"
    told = shown(source, SENT, variables={"enable_thinking": False}, documents=[{"text": "d"}])
    assert told == 'True[{"text": "d"}]'


# ---- instructions

A, B, HI = (
    {"role": "system", "content": "A "},
    {"role": "developer", "content": [{"type": "text", "text": "B"}]},
    {"role": "user", "content": "Hi"},
)
SKIPS = (
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' and loop.first %}"
    "<{{ m.role }}>{{ m.content | trim }}{% endif %}{% endfor %}"
)
FIRST_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}"
    "{% elif m.role not in ['system', 'user'] %}{{ raise_exception('Unexpected message role.') }}"
    "{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)
KNOWS = PRINTS + "{% if messages[0].role == 'developer' %}{% endif %}"


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        (PRINTS, [A, HI, A], "<system>A <user>Hi<system>A "),  # what a template takes stays in its place
        (PRINTS, [B, HI], "<system>B<user>Hi"),
        (KNOWS, [A, B, HI], "<system>A <developer>B<user>Hi"),
        (SKIPS, [B, HI], "<system>B<user>Hi"),
        (SKIPS, [HI, B], "<system>B<user>Hi"),
        (SKIPS, [A, HI, B, HI], "<system>A \n\nB<user>Hi<user>Hi"),
        (FIRST_ONLY, [A, B, HI], "<system>A \n\nB<user>Hi"),
        (FIRST_ONLY, [HI, A], "<system>A<user>Hi"),
        (PARTS, [B, HI], "<system>B<user>Hi"),
        ("{% for m in messages %}{{ m.role[0] }}{% endfor %}", [HI, A], "us"),  # shows nothing at all
    ],
)  # fmt: skip
def test_instructions_reach_the_model_whatever_its_template_takes(
    source: str, messages: list[Any], text: str
) -> None:
    assert shown(source, messages) == text


def test_what_no_arrangement_helps_is_refused_with_the_first_reason() -> None:
    with pytest.raises(RequestError, match="System message must be at the beginning"):
        shown(FIRST_ONLY, [HI, A, {"role": "narrator", "content": "x"}])
    with pytest.raises(RequestError, match="must be at the beginning"):
        shown(FIRST_ONLY, [HI, A], continue_final_message=True)  # it is the last and must stay so
