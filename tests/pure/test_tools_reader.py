"""Calls of tools, told apart from content wherever the text is cut."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.server.templates import ChatTemplate, CompiledTemplate
from baton.server.tools_answer import (
    AT_ONCE,
    ToolReading,
    WholeAnswer,
    entries,
    whole_answer,
)
from baton.server.tools_prompt import tools_text, with_tools_told
from baton.server.tools_reader import Call, CallPiece, CallReader, joined
from baton.server.turns import Conversation
from baton.tool_calls import (
    FORMATS,
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    CallFormat,
    call_text,
    calls_text,
)
from tests.pure.cuts import check_cuts
from tests.pure.heard import Answer, heard

NAMES = ("weather", "get time", 'odd"name', "wetter_für")
PLAIN = [each for each in FORMATS.values() if each.marked is None and not each.channels]
"""The others are in test_tool_calls_marked.py and test_tool_calls_channels.py."""
ROME, NONE = '{"city": "Rome"}', "{}"
TRICKY = '{"a": "</tool_call> } ] \\" \\\\", "b": [{"name": "weather"}, [1, {}]], "ü": "\\u00e9"}'


def called(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls)


WEATHER, TIME = called("weather", ROME), called("get time", TRICKY)
BOTH = (Call("weather", ROME), Call("get time", TRICKY))
LLAMA = called("weather", ROME, "parameters")
# format, text, content, calls, complete
CASES: list[tuple[CallFormat, str, str, tuple[Call, ...], bool]] = [
    (HERMES, "Just text.\n", "Just text.\n", (), True),
    (HERMES, "", "", (), True),
    (HERMES, tagged(WEATHER), "", BOTH[:1], True),
    (HERMES, f"I look.\n\n{tagged(WEATHER, TIME)}\n", "I look.", BOTH, True),
    (HERMES, f"<tool_call>{WEATHER}</tool_call>{tagged(TIME)}", "", BOTH, True),
    (HERMES, f"{tagged(WEATHER)}\nThen: {tagged(TIME)} Done.", "Then:\nDone.", BOTH, True),
    (HERMES, tagged(called('odd"name', NONE)), "", (Call('odd"name', NONE),), True),
    (HERMES, tagged(called("wetter_für", NONE)), "", (Call("wetter_für", NONE),), True),
    (HERMES, tagged('{"name":"weather","arguments":{},"id":"}"}'), "", (Call("weather", NONE),), True),
    (HERMES, "a <tool_cal", "a <tool_cal", (), True), (HERMES, "a <b> <tool_", "a <b> <tool_", (), True),
    (HERMES, "a <tool_calls> b", "a <tool_calls> b", (), True),
    (HERMES, "The <tool_call> tag", "The <tool_call> tag", (), True),
    (HERMES, tagged(called("other", NONE)), tagged(called("other", NONE)), (), True),
    (HERMES, f"<tool_call> no {tagged(WEATHER)}", "<tool_call> no", BOTH[:1], True),
    (HERMES, tagged(called("weather", ROME, "parameters")), tagged(LLAMA), (), True),
    (HERMES, 'a <tool_call>\n{"name": "weat', "a", (), False),
    (HERMES, tagged(WEATHER)[:50], "", (Call("weather", ROME[:5]),), False),
    (HERMES, tagged(WEATHER)[:-3], "", BOTH[:1], True),
    (HERMES, WEATHER, WEATHER, (), True),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {TIME}]", "", BOTH, True),
    (MISTRAL, f"Look: [TOOL_CALLS][{WEATHER}]", "Look:", BOTH[:1], True),
    (MISTRAL, f"[TOOL_CALLS] {WEATHER}", f"[TOOL_CALLS] {WEATHER}", (), True),
    (MISTRAL, f"[{WEATHER}]", f"[{WEATHER}]", (), True), (MISTRAL, "[TOOL", "[TOOL", (), True),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, ", "", BOTH[:1], False),
    (LLAMA3, LLAMA, "", BOTH[:1], True), (LLAMA3, f"\n\n<|python_tag|> {LLAMA}\n", "", BOTH[:1], True),
    (LLAMA3, f"{LLAMA}; {called('get time', TRICKY, 'parameters')}", "", BOTH, True),
    (LLAMA3, f"See {LLAMA}", f"See {LLAMA}", (), True), (LLAMA3, WEATHER, WEATHER, (), True),
    (LLAMA3, '{"name": "Bob"}', '{"name": "Bob"}', (), True), (LLAMA3, "<|py", "<|py", (), True),
    (LLAMA3, ' {"name": "we', ' {"name": "we', (), True), (LLAMA3, LLAMA[:-1], "", BOTH[:1], False),
    (JSON, WEATHER, "", BOTH[:1], True), (JSON, f" [ {WEATHER} ,{TIME} ] ", "", BOTH, True),
    (JSON, f"[{WEATHER}]", "", BOTH[:1], True), (JSON, f"[{WEATHER}, {TIME}", "", BOTH, True),
    (JSON, "[1, 2]", "[1, 2]", (), True), (JSON, f"{WEATHER} Done.", "Done.", BOTH[:1], True),
    (JSON, '{"name": "weather", "arguments": "x"}', '{"name": "weather", "arguments": "x"}', (), True),
    (JSON, "  text ", "  text ", (), True), (JSON, "", "", (), True),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls", "complete"), CASES)
def test_a_whole_answer(
    form: CallFormat, text: str, content: str, calls: tuple[Call, ...], complete: bool
) -> None:
    assert heard(text, ToolReading(form, NAMES)) == Answer(content, calls, complete)


MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", ";", ",", " ", "\n",
         "{", "}", '"', "\\", "a", WEATHER, TIME, LLAMA, WEATHER[:20], "<tool_", "[TOOL"]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from([each[1] for each in CASES]),
    st.lists(st.sampled_from(MARKS), max_size=8).map("".join),
)


@given(st.sampled_from(PLAIN), TEXTS, st.lists(st.integers(0, 250), max_size=12))
def test_wherever_it_is_cut(form: CallFormat, text: str, cuts: list[int]) -> None:
    check_cuts(CallReader(form, NAMES), heard(text, ToolReading(form, NAMES)), text, cuts)


@pytest.mark.parametrize("form", PLAIN)
def test_what_is_written_reads_the_same(form: CallFormat) -> None:
    for calls in (BOTH, BOTH[:1]):
        texts = [call_text(form, each.name, each.arguments) for each in calls]
        assert heard(calls_text(form, texts), ToolReading(form, NAMES)) == Answer("", calls, True)


class Passes(list[CallPiece]):
    """Pieces, and how often somebody went through them."""

    passes = 0

    def __iter__(self) -> Iterator[CallPiece]:
        self.passes += 1
        return super().__iter__()


def test_many_calls_cost_no_more_each_than_few() -> None:
    """Pieces are gone through once, and a call's id is made once."""
    pieces = Passes()
    for index in range(100):
        pieces += [
            CallPiece(index, "f"),
            CallPiece(index, "", '{"a"'),
            CallPiece(index, "", ": 1}"),
        ]
    pieces.passes = 0
    assert joined(pieces) == (Call("f", '{"a": 1}'),) * 100
    assert pieces.passes == 1
    asked: list[int] = []

    def id_of(index: int) -> str:
        asked.append(index)
        return f"call_{index}"

    told = [each for piece in pieces for each in entries([piece], id_of)]
    assert asked == [*range(100)]
    assert [each["id"] for each in told if "id" in each] == [f"call_{i}" for i in range(100)]


def test_an_answer_longer_than_is_read_at_once_is_the_same() -> None:
    text = tagged(*[WEATHER, TIME] * 200)
    assert len(text) > 4 * AT_ONCE
    found = whole_answer(text, "stop", None, ToolReading(HERMES, NAMES))
    assert found == WholeAnswer("", "", BOTH * 200, "tool_calls")


def test_a_template_that_knows_no_tools_gets_them_in_words() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}
    turns: list[dict[str, Any]] = [user, said, {"role": "tool", "content": "2"}]
    told = with_tools_told(Conversation(turns, tools=tools), JSON)
    text = tools_text(tools, JSON)
    assert '{"name": "f", "arguments": {...}}' in text
    assert '{"name": "f", "parameters": {"type": "object"}}' in text
    written = {"role": "assistant", "content": '{"name": "f", "arguments": {"a": 1}}'}
    result = {"role": "user", "content": "Result of the tool: 2"}
    assert list(told.messages) == [{"role": "user", "content": f"{text}\n\nHi"}, written, result]
    assert told.tools is None
    system, parts = {"role": "system", "content": "S"}, [{"type": "text", "text": "Hi"}]
    other = with_tools_told(Conversation([system, user], tools=tools), HERMES).messages[0]
    assert other["content"].startswith("S\n\nYou can call tools.")
    assert "<tool_call>\n{" in other["content"]
    several = with_tools_told(Conversation([user | {"content": parts}], tools=tools), JSON)
    assert several.messages[0]["content"] == [{"type": "text", "text": f"{text}\n\n"}, *parts]
    spoken = said | {
        "content": "Look",
        "tool_calls": [call, {"function": {"name": "f", "arguments": {}}}],
    }
    both = with_tools_told(Conversation([spoken]), JSON).messages[0]["content"]
    assert both == 'Look\n\n[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]'
    assert with_tools_told(Conversation([user]), JSON) == Conversation([user])


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
SKIPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ALTERNATING, SKIPPING])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("after", ["", "And now?"])
def test_a_template_that_knows_no_tools_shows_their_results(
    template: str, parts: bool, after: str
) -> None:
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id_, name in (("1", "f"), ("2", "g"))
    ]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "RAIN"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "SUN"}]},
        {"role": "function", "name": "h", "content": None},
    ]
    if after:
        said = [{"type": "text", "text": after}] if parts else after
        turns.append({"role": "user", "content": said})
    told = with_tools_told(Conversation(turns), JSON)
    text = CompiledTemplate(ChatTemplate(template, {})).render(told)
    results = "<user>Result of g: RAIN\n\nResult of f: SUN\n\nResult of h: "
    assert text.endswith(results + (f"\n\n{after}" if after else ""))


@pytest.mark.parametrize("form", PLAIN)
def test_an_answer_that_must_be_calls_is_never_content(form: CallFormat) -> None:
    """Even if it is cut off before the first name."""
    lead = form.opens or '{"na'
    assert heard(lead, ToolReading(form, NAMES, forced=True)).content == ""
    assert heard(lead, ToolReading(form, NAMES, forced=True)).calls == ()
