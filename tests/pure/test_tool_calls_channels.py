"""Answers in channels (gpt-oss): the grammar, and the reader wherever the text is cut."""

import json
import random
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from baton.errors import RequestError
from baton.grammar import Grammars, tool_calls
from baton.server.templates import ChatTemplate, CompiledTemplate
from baton.server.tools_answer import AnswerReader, ToolReading, WholeAnswer, whole_answer
from baton.server.tools_channels import MOST_HEADER, ChannelReader
from baton.server.tools_reader import Call, joined
from baton.server.turns import Conversation
from baton.text import Tokenizer
from baton.tool_calls import FORMATS, HARMONY, Calls, Tool, call_text, calls_text, format_of
from baton.tool_calls_channels import MARKS
from tests.pure.test_grammar import END, FILE
from tests.pure.test_tool_calls import allowed, goes, shown
from tests.pure.test_tool_calls_marked import CITY as SCHEMA
from tests.pure.test_tool_calls_marked import FREE, LONG, NONE, ROME
from tests.pure.test_tools import ASKED, CHAT, served
from tests.pure.town_app import TownClient

OFFERED = (Tool("weather", SCHEMA), Tool("get_time.now", NONE), Tool("any", FREE))
SCHEMAS = {each.name: each.schema for each in OFFERED}
READING = ToolReading(HARMONY, tuple(SCHEMAS))
NEXT = "<|end|><|start|>assistant"
THOUGHT = f"<|channel|>analysis<|message|>I look.{NEXT}"
SPOKEN = f"<|channel|>commentary<|message|>One moment.{NEXT}"
FINAL = "<|channel|>final<|message|>It rains."
CALL = call_text(HARMONY, "weather", ROME)
AHEAD = f" to=functions.weather<|channel|>commentary json<|message|>{ROME}<|call|>"
BAD = CALL.replace("Rome", "Bonn")
RAIN = CALL.replace("weather", "rain")
MARKED = '{"a": "<|end|>}"}'
ANSWER = {"type": "object", "properties": {"x": {"type": "null"}}}


@cache
def model(marks: bool) -> tuple[Grammars, Tokenizer, int]:
    """With the marks among its special tokens, as gpt-oss has them, or without."""
    found, file = FastTokenizer.from_file(str(FILE)), FILE
    if marks:
        found.add_special_tokens([AddedToken(each, special=True) for each in (*MARKS, "<|other|>")])
        file = Path(tempfile.mkdtemp(prefix="channels-")) / "tokenizer.json"
        found.save(str(file))
    return Grammars(file, found.get_vocab_size(), [END]), Tokenizer(file), found.get_vocab_size()


CASES: list[tuple[str, str, str, tuple[Call, ...], str]] = [
    # text, reasoning, content, calls, finish_reason
    (THOUGHT + FINAL, "I look.", "It rains.", (), "stop"),
    (f"{THOUGHT}{FINAL}<|return|>", "I look.", "It rains.", (), "stop"),
    (f"{THOUGHT}{THOUGHT}{SPOKEN}{FINAL}", "I look.\nI look.", "One moment.\nIt rains.", (), "stop"),
    (CALL, "", "", (Call("weather", ROME),), "tool_calls"),
    (CALL.removesuffix("<|call|>"), "", "", (Call("weather", ROME),), "tool_calls"),
    (THOUGHT + SPOKEN + CALL, "I look.", "One moment.", (Call("weather", ROME),), "tool_calls"),
    (AHEAD, "", "", (Call("weather", ROME),), "tool_calls"),
    (THOUGHT + AHEAD, "I look.", "", (Call("weather", ROME),), "tool_calls"),
    (f"<|start|>assistant{THOUGHT}{FINAL}", "I look.", "It rains.", (), "stop"),
    (f"{CALL}<|start|>assistant{CALL}", "", "", (Call("weather", ROME),) * 2, "tool_calls"),
    (call_text(HARMONY, "weather", LONG), "", "", (Call("weather", LONG),), "tool_calls"),
    (call_text(HARMONY, "any", MARKED), "", "", (Call("any", MARKED),), "tool_calls"),
    (call_text(HARMONY, "any", ""), "", "", (Call("any", "{}"),), "tool_calls"),
    (call_text(HARMONY, "any", "no JSON"), "", "", (Call("any", "no JSON"),), "tool_calls"),
    (RAIN, "", ROME, (), "stop"),
    ("<|channel|>analysis to=python<|message|>1+1<|call|>", "1+1", "", (), "stop"),
    ("Hello", "", "Hello", (), "stop"), ("", "", "", (), "stop"), (" to be", "", " to be", (), "stop"),
    ("a <|channel|> b", "", "a <|channel|> b", (), "stop"), ("<|cha", "", "<|cha", (), "stop"),
    (f"{THOUGHT}<|channel|>fin", "I look.", "", (), "stop"),
    (f"{THOUGHT}<|ch", "I look.", "", (), "stop"),
    (CALL[:-9], "", "", (Call("weather", ROME[:-1]),), "stop"),
    (f"{FINAL}<|end|> well", "", "It rains.\nwell", (), "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reasoning", "content", "calls", "reason"), CASES)
def test_a_whole_answer(
    text: str, reasoning: str, content: str, calls: tuple[Call, ...], reason: str
) -> None:
    found = whole_answer(text, "stop", False, READING)
    assert found == WholeAnswer(reasoning, content, calls, reason)


def test_reasoning_that_is_not_told_apart_is_content() -> None:
    found = whole_answer(THOUGHT + FINAL, "stop", None, READING)
    assert (found.reasoning, found.content) == ("", "I look.\nIt rains.")
    found = whole_answer(f" It{NEXT}{CALL}", "stop", True, READING)  # a message is continued
    assert (found.content, found.calls) == (" It", (Call("weather", ROME),))


PIECES = [*MARKS, "assistant", "analysis", "commentary", "final", " to=functions.", "weather", "rain",
          " ", "json", "{", "}", '"', "a", "\n", "<|", "|>", "<", ROME, THOUGHT, SPOKEN, FINAL, CALL,
          AHEAD]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from([each[0] for each in CASES]),
    st.lists(st.sampled_from(PIECES), max_size=10).map("".join),
)


@given(TEXTS, st.sampled_from([None, False, True]), st.lists(st.integers(0, 400), max_size=16))
def test_wherever_it_is_cut(text: str, thinking: bool | None, cuts: list[int]) -> None:
    reader = AnswerReader(thinking, READING)
    places = sorted({0, *(each for each in cuts if each < len(text)), len(text)})
    found = [*(reader.take(text[a:b]) for a, b in pairwise(places)), reader.end()]
    whole = whole_answer(text, "stop", thinking, READING)
    assert "".join(each.reasoning for each in found) == whole.reasoning
    assert "".join(each.content for each in found) == whole.content
    pieces = [piece for each in found for piece in each.calls]
    assert joined(pieces) == whole.calls
    assert all(bool(each.name) != bool(each.arguments) for each in pieces)
    assert reader.finish_reason("stop") == whole.finish_reason


def test_nothing_endless_is_looked_at_again_and_again() -> None:
    for start in (
        "",
        THOUGHT,
        "<|channel|>",
        CALL[:60],
        CALL[:-8],
        CALL,
        "<|channel|>final<|message|>",
    ):
        for endless in (" ", "a", "<", '"', "{"):
            reader = ChannelReader(SCHEMAS)
            reader.take(start)
            most = max((reader.take(endless), reader.held)[1] for _ in range(MOST_HEADER + 100))
            assert most < MOST_HEADER + 50, (start, endless)


@pytest.mark.parametrize("marks", [False, True])
def test_the_grammar_takes_messages_and_calls_that_fit(marks: bool) -> None:
    grammars, tokenizer, _ = model(marks)
    free, forced = Calls(HARMONY, OFFERED), Calls(HARMONY, OFFERED, True)
    answers = Calls(HARMONY, OFFERED, answer=ANSWER)
    json_ = '<|channel|>final<|message|>{"x": null}'
    for text, in_free, in_forced, in_answers in (
        (CALL, True, True, True), (THOUGHT + CALL, True, True, True), (THOUGHT + AHEAD, True, True, True),
        (SPOKEN + CALL, True, False, False), (THOUGHT + FINAL, True, False, False),
        (FINAL, True, False, False),
        (json_, True, False, True), (THOUGHT + json_, True, False, True), (BAD, False, False, False),
        (THOUGHT + BAD, False, False, False), (f"{FINAL}{NEXT}{BAD}", False, False, False),
        (RAIN, False, False, False), ("Hello", False, False, False),
        (call_text(HARMONY, "weather", LONG), True, True, True),
        (AHEAD.replace("Rome", "Bonn"), False, False, False),
    ):  # fmt: skip
        for calls, may in ((free, in_free), (forced, in_forced), (answers, in_answers)):
            assert goes(grammars, tokenizer, calls, text) == (may, may), (text, calls)
    cut = CALL.removesuffix('"}<|call|>')
    assert goes(grammars, tokenizer, free, cut) == (True, False)
    begun = Calls(HARMONY, OFFERED, thinking=True)
    for text, may in ((" and so on", True), (f" so{NEXT}{CALL}", True), (f" so{NEXT}{BAD}", False)):
        assert goes(grammars, tokenizer, begun, text) == (may, may)


@pytest.mark.parametrize("marks", [False, True])
def test_json_without_tools_is_the_last_message(marks: bool) -> None:
    grammars, tokenizer, _ = model(marks)
    calls = Calls(HARMONY, (), answer=ANSWER)
    json_ = '<|channel|>final<|message|>{"x": null}'
    for text, may in (
        (json_, True), (THOUGHT + json_, True), (THOUGHT + THOUGHT + json_, True), (FINAL, False),
        ('{"x": null}', False), (CALL, False), (THOUGHT + CALL, False), (SPOKEN + json_, False),
        (json_.replace("null", "1"), False), (json_.replace("final", "commentary"), False),
    ):  # fmt: skip
        assert goes(grammars, tokenizer, calls, text) == (may, may), text
    assert Calls.read(calls.written()) == calls


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_an_answer_without_tools_is_json_in_a_channel_or_no_answer_of_this_kind(form: Any) -> None:
    for calls in (Calls(form, ()), Calls(form, (), True, answer=ANSWER)):
        with pytest.raises(RequestError, match="no tool calls"):
            Calls.read(calls.written())
    if not form.channels:
        with pytest.raises(RequestError, match="no tool calls"):
            Calls.read(Calls(form, (), answer=ANSWER).written())


@settings(max_examples=30, deadline=None, phases=[Phase.generate])
@given(st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_what_is_drawn_reads_as_text_and_calls_that_fit_their_schemas(
    marks: bool, forced: bool, draw: random.Random
) -> None:
    grammars, tokenizer, size = model(marks)
    likes = tokenizer.encode(THOUGHT + call_text(HARMONY, "weather", LONG), special=False)
    guide, ids = grammars.open(tool_calls(Calls(HARMONY, OFFERED, forced))), list[int]()
    at = 0
    while len(ids) < 100 and not guide.finished:
        may = allowed(guide, size)
        liked = [each for each in likes[at : at + 1] if each in may]
        if not liked and END in may and draw.random() < 0.5:
            break
        ids.append(liked[0] if liked and draw.random() < 0.95 else draw.choice(may))
        at = likes.index(ids[-1], at) + 1 if ids[-1] in likes[at:] else at
        assert guide.accept(ids[-1])
    ended = guide.finished or END in allowed(guide, 1)
    found = whole_answer(shown(ids, tokenizer, HARMONY), "stop", False, READING)
    for call in found.calls:
        if ended:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert len(found.calls) < 2
    assert not forced or (not found.content and (found.calls or not ended))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and 'tool_calls' in m %}"
    "{% set call = m.tool_calls[0].function %}{% if m.content and m.thinking %}"
    "{{ raise_exception('not both') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.content or m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>{% elif m.role == 'tool' %}<|start|>functions.x to=assistant"
    "<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}"
    "<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|start|>assistant{# tools #}"
)


def test_a_template_of_channels_shows_all_calls_and_all_that_was_said() -> None:
    """gpt-oss's shows the first call of a turn alone, and refuses reasoning beside a text."""
    assert format_of(TEMPLATE) is HARMONY
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in (("1", "weather", ROME), ("2", "any", '{"a": 1}'))
    ]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One moment.", "reasoning_content": "I look.",
         "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "RAIN"},
        {"role": "tool", "tool_call_id": "2", "content": "2"},
        {"role": "assistant", "content": "It rains.", "tool_calls": []},
    ]  # fmt: skip
    text = CompiledTemplate(ChatTemplate(TEMPLATE, {})).render(Conversation(turns))
    result = "<|start|>functions.x to=assistant<|channel|>commentary<|message|>"
    assert text == (
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I look.\nOne moment.<|end|>"
        f'<|start|>assistant{AHEAD}{result}"RAIN"<|end|>'
        '<|start|>assistant to=functions.any<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        f'{result}"2"<|end|><|start|>assistant<|message|>It rains.<|end|><|start|>assistant'
    )


def test_calls_are_written_as_they_are_read() -> None:
    text = calls_text(HARMONY, [CALL, call_text(HARMONY, "any", '{"a": 1}', 1)])
    found = whole_answer(text, "stop", False, READING)
    assert found.calls == (Call("weather", ROME), Call("any", '{"a": 1}'))
    with pytest.raises(RequestError, match="cannot be written in calls"):
        tool_calls(Calls(HARMONY, (Tool("a b", FREE),)))
    assert FORMATS["harmony"] is HARMONY


def test_a_chat_has_reasoning_content_and_calls_whole_and_streamed() -> None:
    async def work(client: TownClient) -> None:
        asked = ASKED | {"max_tokens": 200}
        message, streamed = await both(client, asked)
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], message["reasoning_content"]) == ("weather", "I look.")
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        assert message["content"] == "One moment."
        assert streamed == ("I look.", "One moment.", call["function"]["arguments"])

    served(work, THOUGHT + SPOKEN + CALL, template=TEMPLATE)


def test_a_chat_without_tools_has_reasoning_apart() -> None:
    """No grammar guides it: the answer is what the model says."""

    async def work(client: TownClient) -> None:
        asked = {"messages": ASKED["messages"], "max_tokens": 8, "temperature": 0}
        message, streamed = await both(client, asked)
        assert message["content"]
        assert message["reasoning_content"] is None
        assert streamed == ("", message["content"], "")

    served(work, "", template=TEMPLATE)


FORMS = {
    "an object": {"type": "json_object"},
    "a schema": {"type": "json_schema", "json_schema": {"name": "x", "schema": ANSWER}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_json_is_content_and_what_is_thought_before_it_is_reasoning(form: dict[str, Any]) -> None:
    async def work(client: TownClient) -> None:
        asked = {"messages": ASKED["messages"], "max_tokens": 200, "response_format": form}
        message, streamed = await both(client, asked)
        assert json.loads(message["content"]) == {"x": None}
        assert (message["reasoning_content"], message.get("tool_calls")) == ("I look.", None)
        assert streamed == ("I look.", message["content"], "")

    said = THOUGHT + '<|channel|>final<|message|>{"x": null}'
    served(work, said, template=TEMPLATE)


async def both(client: TownClient, asked: dict[str, Any]) -> tuple[Any, tuple[str, str, str]]:
    """The message, and the reasoning, content and arguments of the same answer in pieces."""
    whole = await client.ask(CHAT, asked, submits=1)
    assert whole.status == 200, whole.json
    stream = await client.ask(CHAT, asked | {"stream": True}, submits=1)
    lines = [each for each in stream.body.decode().splitlines() if each.startswith("data: {")]
    deltas = [json.loads(each.removeprefix("data: "))["choices"][0]["delta"] for each in lines]
    texts = [
        "".join(each.get(n) or "" for each in deltas) for n in ("reasoning_content", "content")
    ]
    calls = [call for each in deltas for call in each.get("tool_calls", ())]
    arguments = "".join(each["function"]["arguments"] for each in calls)
    return whole.json["choices"][0]["message"], (texts[0], texts[1], arguments)
