"""Reasoning and content, told apart wherever the text is cut, and as a chat shows them."""

import asyncio
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cli.chat import _turn
from baton.server.schema import ChatRequest
from baton.server.shapes import ChatShape, Choice, Delta, Extras
from baton.server.speech import Said, Speech, is_open, told_apart
from tests.pure.town_app import TownClient, pretend_tokenizer, serving

CASES = [
    ("<think>\nhm\n</think>\n\nYes.", False, Said("hm", "Yes.")),
    ("hm\n</think>\n\nYes.", True, Said("hm", "Yes.")),
    ("\n<think>\n\n</think>\n\nYes.", False, Said("", "Yes.")),
    ("Yes.", False, Said("", "Yes.")), ("  Yes <think> no", False, Said("", "  Yes <think> no")),
    ("<think>a < b </thin b", False, Said("a < b </thin b", "")), ("<thi", False, Said("", "<thi")),
    ("<thing>", False, Said("", "<thing>")), ("a  b</think>", True, Said("a  b", "")),
    ("", True, Said()), ("", False, Said()), ("x</think> y </think> ", True, Said("x", "y </think> ")),
    ("<think> a <think> b</think>c", False, Said("a <think> b", "c")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "begun", "said"), CASES)
def test_a_whole_answer_is_told_apart(text: str, begun: bool, said: Said) -> None:
    assert told_apart(text, begun=begun) == said


@given(st.sampled_from(CASES), st.lists(st.integers(0, 40), max_size=12))
def test_wherever_it_is_cut(case: tuple[str, bool, Said], cuts: list[int]) -> None:
    text, begun, said = case
    speech, places = Speech(begun=begun), sorted({0, *cuts, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    found = [*map(speech.take, pieces), speech.end()]
    assert "".join(each.reasoning for each in found) == said.reasoning
    assert "".join(each.content for each in found) == said.content


@pytest.mark.parametrize(
    ("before", "said", "open_"),
    [
        ("a:", "<think>\nhm", True), ("a:", " <think>", True), ("a:", "<think>hm</think>\nYes", False),
        ("a:", "plain", False), ("a:", "", False), ("u:what is <think>?\na:", "It", False),
        ("u:</think>\na:", "<think>hm", True), ("a:", "The tag <think> begins it", False),
        ("a:", "<think>hm</think> It is <think>", False), ("u:</think>\na:<think>\n", "hm ", True),
        ("a:<think>\n", "hm</think>Yes", False), ("a:<think>\n", "", True),
    ],
)  # fmt: skip
def test_a_continued_answer_may_end_within_its_reasoning(
    before: str, said: str, open_: bool
) -> None:
    assert is_open(said, before + said) is open_
    assert is_open(said, before + said.strip()) is open_  # a template may strip it


HEAD = {"id": "x", "created": 1, "model": "m"}


def shape(**more: Any) -> ChatShape:
    return ChatShape(HEAD, pretend_tokenizer(), Extras(thinking=False, **more))


def test_a_chat_has_both_whole_and_streamed() -> None:
    text = "<think>hm</think>Yes"
    whole = json.loads(shape().whole([Choice(0, (1,), text=text)], {}))["choices"][0]["message"]
    assert (whole["reasoning_content"], whole["content"]) == ("hm", "Yes")
    streaming, told = shape(), []
    choice = Choice(0, (1,), finish_reason="stop")
    for piece in ("<thi", "nk>h", "m<", "/think>", "Yes"):
        told.append(streaming.piece(Delta(choice, piece, (), ()))["choices"][0]["delta"])
    told.append(streaming.closing(choice)["choices"][0]["delta"])
    assert "".join(each.get("reasoning_content", "") for each in told) == "hm"
    assert "".join(each.get("content", "") for each in told) == "Yes"
    assert told[1] == {"reasoning_content": "h"}


def test_an_answer_that_ends_early_loses_nothing() -> None:
    streaming, choice = shape(), Choice(0, (1,), finish_reason="length")
    for piece, said in (("<think>a <", {"reasoning_content": "a"}), ("/th", {})):
        delta = streaming.piece(Delta(choice, piece, (), ()))["choices"][0]["delta"]
        assert delta == said or delta == {"content": ""}
    assert streaming.closing(choice)["choices"][0]["delta"] == {"reasoning_content": " </th"}
    cut = json.loads(shape().whole([Choice(0, (1,), text="<think>a")], {}))["choices"][0]["message"]
    assert (cut["reasoning_content"], cut["content"]) == ("a", None)


def test_reasoning_may_be_left_out() -> None:
    choice = Choice(0, (1,), text="<think>hm</think>Yes")
    quiet = shape(shows_reasoning=False)
    message = json.loads(quiet.whole([choice], {}))["choices"][0]["message"]
    assert message["content"] == "Yes"
    assert "reasoning_content" not in message
    assert quiet.piece(Delta(choice, "<think>hm", (), ()))["choices"][0]["delta"] == {"content": ""}


THINKS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>\n{% endif %}"
)
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
SPLIT = {"reasoning_content"}


@pytest.mark.parametrize(
    ("template", "options", "fields", "keys"),
    [
        (THINKS, {}, {}, SPLIT), (THINKS.replace("think", "thought"), {}, {}, set()),
        (THINKS, {"reasoning": "off"}, {}, set()), (THINKS, {}, {"include_reasoning": False}, set()),
    ],
)  # fmt: skip
def test_models_whose_template_knows_reasoning_have_it_split_off(
    template: str, options: dict[str, Any], fields: dict[str, Any], keys: set[str]
) -> None:
    async def work(client: TownClient) -> Any:
        return (await client.ask("/v1/chat/completions", HELLO | fields, submits=1)).json

    async def run() -> Any:
        async with serving(template=template, **options) as client:
            return await work(client)

    message = asyncio.run(run())["choices"][0]["message"]
    assert message.keys() & SPLIT == keys
    if keys:  # the town never ends its reasoning
        assert message["reasoning_content"]
        assert message["content"] is None


def test_a_grammar_is_about_all_that_is_said_and_a_continued_answer_may_have_begun_to_reason() -> (
    None
):
    def talk(asked: str, said: Any, role: str = "assistant") -> dict[str, Any]:
        turns = [{"role": "user", "content": asked}, {"role": role, "content": said}]
        return HELLO | {"messages": turns, "continue_final_message": True}

    part = {"type": "text", "text": "<think>hm"}
    cases = (
        (HELLO, True), (HELLO | {"guided_regex": "a+"}, None),
        (HELLO | {"add_generation_prompt": False}, False),
        (talk("Hi", "<think>hm"), True), (talk("What is <think>?", "It is"), False),
        (talk("What is </think>?", "<think>hm"), True), (talk("Hi", "<think>", role="user"), False),
        (talk("And </think>?", [part, {"type": "text", "text": ", well"}]), True),
    )  # fmt: skip

    async def run() -> None:
        async with serving(template=THINKS) as client:
            for asked, thinking in cases:
                request = ChatRequest.model_validate(asked)
                prepared = await client.service.prepare(request, stream=False)
                prepared.ticket.close()
                assert prepared.shape._extras.thinking is thinking

    asyncio.run(run())


class Answers:
    """A server whose answer comes in these deltas."""

    def __init__(self, *deltas: dict[str, str]) -> None:
        self.deltas = deltas

    def stream(self, path: str, body: Any) -> Any:
        return [{"choices": [{"delta": each}]} for each in self.deltas]


def test_a_terminal_shows_both_and_the_next_turn_has_the_answer_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    client: Any = Answers({"role": "assistant"}, {"reasoning_content": "h"}, {"reasoning_content": "m"},
                          {"content": "Y"}, {"content": "es"})  # fmt: skip
    turns = _turn(client, "m", "Hi", [], {})
    assert turns[-1] == {"role": "assistant", "content": "Yes"}
    shown = re.sub("\x1b\\[[0-9]*m", "", capsys.readouterr().out)
    assert shown == "hm\n\nYes\n"
